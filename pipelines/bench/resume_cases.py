"""Random interruptions for the ``resume`` bench: a small real data set, drawn recipes, and runs cut at any step.

A run goes through the feeder's own functions (``PrepareSteps`` over blocks of steps, ``drawn_blocks``, ``Feeder.plan``
and ``Feeder.position``); only Ray Data's scheduling is replaced by readers that finish their blocks in a drawn order.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from actors.drawing import drawn_blocks, needs_drawing
from actors.feeder import STEPS_PER_BLOCK, Feeder, PrepareSteps
from omni_ray.config.load import check_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.data.audio import encode_flac
from omni_ray.data.image import encode_png
from omni_ray.data.order_state import OrderState
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.training.data_position import guarantees, position_record, resumed_state
from omni_ray.training.prepare import StepBuilder

SOURCES = {"text": 60, "notes": 23, "speech": 31, "picture": 27}
"""Samples of each source: small, so that passes end inside a run."""
KINDS = ("balance", "take", "best_fit", "split")
Stream = list[tuple[int, int, tuple[str, ...]]]
"""(step, micro-batch, samples) in order."""


def write_world(root: Path, seed: int) -> None:
    """Shards of text, speech and pictures under ``root``."""
    rng = np.random.default_rng(seed)
    words = ["which", "digit", "is", "it", "red", "seven", "blue", "two"]
    Tokenizer.learn([" ".join(words) + "\nUSER: ASSISTANT: VOICE ASSISTANT:"] * 3).save(root / "tokenizer.json")
    answer = {"role": "assistant", "content": [{"type": "text", "text": " red seven"}]}
    for source, count in SOURCES.items():
        (root / source).mkdir()
        with tarfile.open(root / source / "train-00000.tar", "w") as tar:
            for number in range(count):
                parts, media = _medium(source, rng)
                length = int(rng.integers(1, 40 if source == "text" else 6))
                parts.append({"type": "text", "text": " ".join(rng.choice(words, length))})
                record = {"kind": source, "messages": [{"role": "user", "content": parts}, answer]}
                for name, raw in {"json": json.dumps(record).encode(), **media}.items():
                    member = tarfile.TarInfo(f"{source}-{number:04d}.{name}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))


def _medium(source: str, rng: np.random.Generator) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    if source == "picture":
        raw = encode_png(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8))
        return [{"type": "image", "media": "a.png"}], {"a.png": raw}
    if source == "speech":
        samples = int(rng.integers(2000, 12000))
        raw = encode_flac((rng.standard_normal(samples) * 0.1).astype(np.float32), 16000)
        return [{"type": "audio", "media": "a.flac"}], {"a.flac": raw}
    return [], {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What may differ between the two halves of a run."""

    readers: int
    """Decode tasks, 1 to 8."""
    ranks: int
    """Language and encoder ranks, 1 to 8."""
    prefetch: int
    """Steps planned ahead of the one that is used."""
    seed: int
    """Draws the order in which readers finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run and where it is cut."""

    stages: tuple[dict[str, Any], ...]
    """Stages as a recipe writes them."""
    seed: int
    """The recipe's seed."""
    stop: int
    """Steps done when it is cut."""
    before: Shape
    after: Shape
    facts: dict[str, Any] = field(default_factory=dict)
    """For the report: kinds, and whether the cut is a stage boundary."""


def draw_case(rng: np.random.Generator) -> Case:
    """A case; half of those with several stages are cut exactly where a stage ends."""
    stages: list[dict[str, Any]] = []
    bounds: list[int] = []
    for number in range(int(rng.integers(1, 4))):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        steps = int(rng.integers(1, 6))
        stages.append(_stage(f"S{number}", kind, steps, rng))
        bounds.append((bounds[-1] if bounds else 0) + steps)
    at_boundary = len(bounds) > 1 and rng.random() < 0.5
    stop = int(rng.choice(bounds[:-1]) if at_boundary else rng.integers(0, bounds[-1] + 1))
    shapes = [
        Shape(
            readers=int(rng.integers(1, 9)),
            ranks=int(rng.integers(1, 9)),
            prefetch=int(rng.integers(0, 4)),
            seed=int(rng.integers(1 << 30)),
        )
        for _ in range(2)
    ]
    facts = {"kinds": [stage["packing"]["kind"] for stage in stages], "boundary": stop in bounds[:-1]}
    return Case(
        stages=tuple(stages), seed=int(rng.integers(1000)), stop=stop, before=shapes[0], after=shapes[1], facts=facts
    )


def _stage(name: str, kind: str, steps: int, rng: np.random.Generator) -> dict[str, Any]:
    packing = {"kind": "balance" if kind == "take" else kind, "budget": 96, "lookahead": int(rng.integers(4, 20))}
    mixture: dict[str, Any]
    if kind == "balance" or (kind != "take" and rng.random() < 0.3):
        chosen = rng.choice(list(SOURCES), size=int(rng.integers(1, 4)), replace=False)
        mixture = {str(source): _value(rng, 3, least=1.0) for source in chosen}
    else:
        mixture = _nested(rng)
    if kind == "take":
        amounts = ({"samples": int(rng.integers(2, 9))}, {"rows": int(rng.integers(60, 250))}, {"cost": 200.0})
        mixture["take"] = amounts[int(rng.integers(3))]
    return {
        "name": name,
        "steps": steps,
        "mixture": mixture,
        "packing": packing,
        "trainable": ["language"],
        "seq_len": 96,
        "micro_batches": int(rng.integers(1, 4)),
    }


def _nested(rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 0.5:
        shares = {"text": ["text", "notes"], "vision": ["picture"], "speech": ["speech"]}
        return {
            "modalities": {
                name: {
                    "share": 6.0 if name == "text" else _value(rng, 1),
                    "blend": [{"source": s, "weight": _value(rng, 2)} for s in sources],
                }
                for name, sources in shares.items()
            }
        }
    passes = [{"source": "notes", "repeat": 2}, {"source": "picture", "choose": 9}, {"source": "speech"}]
    return {
        "per": "rows" if rng.random() < 0.5 else "samples",
        "blend": [
            {"source": "text", "weight": _value(rng, 4), "part": [0.0, 0.6]},
            {"weight": _value(rng, 4), "blend": passes},
        ],
    }


def _value(rng: np.random.Generator, most: float, least: float = 0.1) -> Any:
    low, high = (round(float(x), 1) + least for x in rng.uniform(0, most, 2))
    forms: tuple[Any, ...] = (
        low,
        {"linear": [[0, low], [4, high]]},
        {"piecewise": [[0, low], [2, high]]},
    )
    return forms[int(rng.integers(3))]


class ReaderFeeder(Feeder):
    """The feeder with readers in this process in the place of Ray Data's tasks."""

    def __init__(self, recipe: Recipe, root: Path, state: OrderState | None, shape: Shape) -> None:
        super().__init__(recipe, root, 0 if state is None else state.step, state)
        self.shape = shape

    def _stream(self, first: int) -> Iterator[dict[str, Any]]:
        """Blocks of steps go to readers; a round's blocks finish in a drawn order and are put back by number."""
        rng = np.random.default_rng(self.shape.seed)
        readers: dict[int, PrepareSteps] = {}
        blocks = self._blocks(first)
        while turn := list(enumerate(islice(blocks, self.shape.readers))):
            done: dict[int, list[dict[str, Any]]] = {}
            for place in rng.permutation(len(turn)):
                reader, rows = turn[place]
                if reader not in readers:
                    readers[reader] = PrepareSteps(self.recipe, self.root, self.state)
                done[place] = [readers[reader](row) for row in rows]
            for place in sorted(done):
                yield from done[place]

    def _blocks(self, first: int) -> Iterator[list[dict[str, Any]]]:
        """What Ray Data would hand to decode tasks: step numbers, or steps that were drawn in one place."""
        stop = self.recipe.total_steps
        if needs_drawing(self.recipe, first, stop):
            for table in drawn_blocks(self.recipe, self.root, self.state, first, stop):
                yield table.to_pylist()
            return
        for start in range(first, stop, STEPS_PER_BLOCK):
            yield [{"step": step} for step in range(start, min(start + STEPS_PER_BLOCK, stop))]


def recipe_of(case: Case, shape: Shape) -> Recipe:
    """The case's recipe at the sizes of a half."""
    sources = {name: {"path": "{data}/" + name} for name in SOURCES}
    pools = {name: {"actors": shape.ranks} for name in ("vision", "audio", "language")}
    data = {"sources": sources, "workers": shape.readers, "prefetch_steps": shape.prefetch}
    return check_recipe({"size": "tiny", "seed": case.seed, "stages": list(case.stages), "pools": pools, "data": data})


def run(
    case: Case, root: Path, shape: Shape, state: OrderState | None, stop: int
) -> tuple[Stream, OrderState | None, Recipe]:
    """Use the steps from ``state`` to ``stop`` and give their samples; the position is read behind the prefetch."""
    recipe = recipe_of(case, shape)
    feeder = ReaderFeeder(recipe, root, state, shape)
    first = 0 if state is None else state.step
    stream: Stream = []
    for step in range(first, stop):
        for ahead in range(step, min(step + shape.prefetch, recipe.total_steps - 1) + 1):
            feeder.plan(ahead)
        plan, _ = feeder.plan(step)
        keys = [("rows", batch.index, 0) for batch in plan.micro_batches]
        feeder.payloads(step, keys)
        by_rank = {batch.index: batch.samples for rank in range(shape.ranks) for batch in plan.micro_batches
                   if batch.language_rank == rank}  # fmt: skip
        stream += [(step, index, by_rank[index]) for index in sorted(by_rank)]
    return stream, feeder.position(stop) if stop > first else state, recipe


def interrupted(case: Case, root: Path, drop: bool = False) -> tuple[Stream, Stream]:
    """The stream of a whole run, and of the same run cut at ``case.stop`` and gone on with at other sizes.

    Args:
        case: What to run.  root: Data.  drop: Lose one sample on purpose: the saved position counts one draw too many.
    """
    total = sum(stage["steps"] for stage in case.stages)
    whole, _, _ = run(case, root, Shape(readers=1, ranks=1, prefetch=0, seed=0), None, total)
    first, state, recipe = run(case, root, case.before, None, case.stop)
    if state is None:  # cut before the first step: there is no checkpoint yet
        return whole, run(case, root, case.after, None, total)[0]
    text = json.dumps(position_record(state, guarantees(StepBuilder(recipe, root))))
    record = json.loads(text)
    if drop:
        record |= _one_draw_too_many(OrderState.from_record(record)).to_record()
    state = resumed_state(StepBuilder(recipe_of(case, case.after), root), record)
    return whole, first + run(case, root, case.after, state, total)[0]


def _one_draw_too_many(state: OrderState) -> OrderState:
    from dataclasses import replace

    stream = max(state.drawn, key=lambda key: (state.drawn[key], key))
    return replace(state, drawn={**state.drawn, stream: state.drawn[stream] + 1})
