"""``resume``: the order of samples over random interruptions, what its position weighs, and what going on costs.

Beside it, the same map-style job through ``torchdata``'s StatefulDataLoader, as reported figures.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from omni_ray.config.load import check_recipe
from omni_ray.data.order_state import OrderState
from omni_ray.observability.progress import Progress
from omni_ray.training.data_position import guarantees, position_record, resumed_state
from omni_ray.training.prepare import StepBuilder
from pipelines.bench.resume_cases import SOURCES, Case, Shape, draw_case, interrupted, write_world
from pipelines.bench.writer import BenchReport, Figure, alternate, counted, environment, measured, negative_control
from pipelines.bench.writer import not_run as figure_not_run

CASES = 1000
ROWS_SMALL, ROWS_LARGE = 1_000, 1_000_000
STOPS = (1_000, 100_000, 1_000_000)
"""Rows after which the run of ``first_batch_ratio`` stopped."""
STARTS = 10
"""Starts timed together: one takes milliseconds, in which a clock sees mostly the machine's other work."""
JOBS: dict[str, dict[str, Any]] = {
    # Whole counts, so that the first step and the one after a stop hold as many samples; fractions are in the cases.
    "plain": {"mixture": {"text": 5, "speech": 2, "picture": 2}},
    "ratio, best_fit": {
        "mixture": {
            "modalities": {
                "text": {"share": 6, "blend": [{"source": "text", "weight": 2}, {"source": "notes", "weight": 1}]},
                "vision": {"share": 1, "blend": [{"source": "picture"}]},
                "speech": {"share": 1, "blend": [{"source": "speech"}]},
            }
        },
        "packing": {"kind": "best_fit", "budget": 256},
    },
    "blend, split": {
        "mixture": {"blend": [{"source": "text", "weight": 3}, {"source": "speech", "weight": 1}]},
        "packing": {"kind": "split", "budget": 256},
    },
}


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """All figures.

    Args:
        quick: Fewer repeats of the timings; the cases stay a thousand.  seed: Draws other cases and data.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_world(root, seed)
        figures = [*_cases(root, seed), *_growth(root), *_first_batch(root, 5 if quick else 9)]
        figures += _torchdata(root, 5 if quick else 9)
    return BenchReport(bench="resume", figures=tuple(figures), environment=environment(seed=seed, quick=quick))


def _cases(root: Path, seed: int) -> list[Figure]:
    rng = np.random.default_rng(seed)
    mismatches, boundaries, kinds = 0, 0, dict[str, int]()
    with Progress("resume", CASES, unit="case") as line:
        for _ in range(CASES):
            case = draw_case(rng)
            whole, cut = interrupted(case, root)
            mismatches += whole != cut
            boundaries += bool(case.facts["boundary"])
            for kind in case.facts["kinds"]:
                kinds[kind] = kinds.get(kind, 0) + 1
            line.advance(mismatches=mismatches)
    whole, cut = interrupted(_control_case(), root, drop=True)
    caught = int(whole != cut)
    drawn = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [
        Figure(
            name="cases",
            value=CASES,
            unit="count",
            better="higher",
            goal=1000,
            against=f"readers 1..8, ranks 1..8, prefetch 0..3; {boundaries} cut at a stage boundary; stages: {drawn}",
            n=CASES,
            runs=(CASES,),
        ),
        counted("mismatches", mismatches, n=CASES, against="sample-id stream of the uninterrupted run"),
        negative_control(caught, "one sample dropped: the saved position counts one draw too many"),
    ]


def _control_case() -> Case:
    shape = Shape(readers=2, ranks=2, prefetch=1, seed=0)
    stage = {"name": "S", "steps": 8, "mixture": {"text": 3}, "trainable": ["language"], "seq_len": 96}
    return Case(stages=(stage,), seed=0, stop=3, before=shape, after=replace(shape, readers=5))


def _builder(root: Path, job: str, state: OrderState | None = None) -> StepBuilder:
    stage = {"name": "S", "steps": 10**9, "trainable": ["language"], "seq_len": 96, "micro_batches": 2}
    sources = {name: {"path": "{data}/" + name} for name in SOURCES}
    recipe = check_recipe({"size": "tiny", "stages": [stage | JOBS[job]], "data": {"sources": sources}})
    return StepBuilder(recipe, root, state=state)


def _positions(root: Path, job: str, rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """Records after so many rows, step by step through the builder's own draws."""
    builder, found, seen, step = _builder(root, job), [], 0, 0
    rests_on = guarantees(builder)
    for wanted in rows:
        while seen < wanted:
            draw = builder.draw(step)
            seen += sum(_piece_rows(builder, piece) for piece in draw.pieces)
            step += 1
        assert draw.after is not None
        found.append(position_record(draw.after, rests_on))
    return found


def _piece_rows(builder: StepBuilder, piece: Any) -> int:
    stop = builder.measure(piece.ref).total if piece.stop is None else piece.stop
    return int(stop - piece.start)


def _growth(root: Path) -> list[Figure]:
    ratios, sizes = [], []
    for job in JOBS:
        small, large = (len(json.dumps(r)) for r in _positions(root, job, (ROWS_SMALL, ROWS_LARGE)))
        ratios.append(large / small)
        sizes.append(f"{job} {large} bytes")
    worst = Figure(
        name="state_growth",
        value=max(ratios),
        unit="ratio",
        better="lower",
        goal=1.05,
        against=f"bytes at 10^6 rows over 10^3, the worst of: {'; '.join(sizes)}",
        n=len(ratios),
        runs=tuple(ratios),
    )
    return [worst]


def _first_batch(root: Path, repeats: int) -> list[Figure]:
    """Seconds to the first prepared step, from nothing and from every stop; the worst stop counts."""
    medians, runs = [], []
    stop: int | str
    for job in JOBS:
        records = [json.dumps(record) for record in _positions(root, job, STOPS)]
        sides: dict[str, Callable[[], float]] = {"cold": lambda job=job: _time_cold(root, job)}  # type: ignore[misc]
        for stop, text in zip(STOPS, records, strict=True):
            sides[str(stop)] = lambda job=job, text=text: _time_resumed(root, job, text)  # type: ignore[misc]
        times = alternate(sides, repeats, warm_up=lambda job=job: _time_cold(root, job))  # type: ignore[misc]
        cold = times.pop("cold")
        for stop, seconds in times.items():
            ratios = [s / c for s, c in zip(seconds, cold, strict=True)]
            medians.append((float(np.median(ratios)), f"{job} after {stop} rows"))
            runs.append(ratios)
    worst = max(range(len(medians)), key=lambda i: medians[i][0])
    against = f"resumed over cold start, the worst of {len(medians)} jobs and stops: {medians[worst][1]}"
    return [measured("first_batch_ratio", runs[worst], unit="ratio", better="lower", goal=1.2, against=against)]


def _time_cold(root: Path, job: str) -> float:
    started = time.perf_counter()
    for _ in range(STARTS):
        _builder(root, job).build(0)
    return time.perf_counter() - started


def _time_resumed(root: Path, job: str, text: str) -> float:
    started = time.perf_counter()
    for _ in range(STARTS):
        record = json.loads(text)
        builder = _builder(root, job, OrderState.from_record(record))
        builder.build(resumed_state(builder, record).step)
    return time.perf_counter() - started


def _torchdata(root: Path, repeats: int) -> list[Figure]:
    """The plain job's text source through StatefulDataLoader: what its state weighs, what going on costs."""
    names = ("torchdata_state_bytes", "torchdata_state_growth", "torchdata_first_batch_ratio")
    if find_spec("torchdata") is None:
        why = "torchdata is not installed"
        return [figure_not_run(name, why, unit="ratio", better="lower") for name in names]
    from pipelines.bench.resume_torchdata import growth, time_first_batch

    small, large = growth(root)
    sides = {
        "cold": lambda: time_first_batch(root, None),
        "resumed": lambda: time_first_batch(root, large),
    }
    times = alternate(sides, repeats, warm_up=lambda: time_first_batch(root, None))
    ratios = [r / c for r, c in zip(times["resumed"], times["cold"], strict=True)]
    sizes = [len(pickle.dumps(state)) for state in (small, large)]
    note = "torchdata StatefulDataLoader, RandomSampler, two workers, batches of 8, after 10^4 samples"
    return [
        measured(names[0], [float(sizes[1])], unit="bytes", better="lower", against=note),
        measured(names[1], [sizes[1] / sizes[0]], unit="ratio", better="lower", against=f"{note} over 10^2"),
        measured(names[2], ratios, unit="ratio", better="lower", against=f"{note}; resumed over cold start"),
    ]
