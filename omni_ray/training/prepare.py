"""From a step number to everything the step needs: samples, rows, plan, decoded media. One process, pure, no Ray.

The feeder maps this function through Ray Data; tests, the reference and `data preview` call it directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_ray.balance.cost import language_cost, media_cost
from omni_ray.balance.step_plan import PoolRanks, check_plan, make_plan, pack
from omni_ray.config.mixture import Mixture, StepValue
from omni_ray.config.recipe import Recipe
from omni_ray.data.chat import encode_sample, loss_counts
from omni_ray.data.decoded_cache import DecodedCache
from omni_ray.data.forms import CHANCE_FORMS, chance_of, shaped
from omni_ray.data.media import decode_spans
from omni_ray.data.mixture import SampleRows
from omni_ray.data.order import Piece, SampleRef, StepDraw
from omni_ray.data.order_state import OrderState
from omni_ray.data.packing import sample_rows, slice_sample
from omni_ray.data.planner import OrderPlanner, StageOrder
from omni_ray.data.sources import FileSource, ReadLimits, is_there, open_configured, read_together
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.batch import OmniBatch, StepPlan
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, Sample

MEASURED_SAMPLES = 50_000
"""Samples whose row counts are kept."""
READ_BYTES = 64 * 2**20
"""Bytes of samples that were read to count their rows and are kept until they are decoded."""
_Chosen = tuple[str, EncodedSample, tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """All inputs of one training step."""

    plan: StepPlan
    """Routes, micro-batches, counts."""
    batches: tuple[OmniBatch, ...]
    """Packed rows by micro-batch; codec ids still empty."""
    media: Mapping[int, Any]
    """Decoded media by item id: uint8 frames [1 or 2, h, w, 3], or float32 waves at 16 kHz."""
    targets: frozenset[int]
    """Speech items that the model itself speaks."""
    bad: tuple[str, ...]
    """Samples that could not be decoded: replaced by the next one of their source, or left out of their sequence."""
    after: OrderState | None = None
    """Where the order stands after this step: what a checkpoint keeps."""


class StepBuilder:
    """Builds prepared steps of a recipe; holds the sources' indices and a cache of decoded samples."""

    def __init__(self, recipe: Recipe, root: Path, *, state: OrderState | None = None) -> None:
        """Open the sources.

        Args:
            recipe: The run.  root: Data root.
            state: Where a resumed run goes on; steps before it are not drawn again.
        """
        self.recipe = recipe
        self.root = root
        self.tokenizer = fitting_tokenizer(recipe, root)
        self.stages = stage_orders(recipe, root)
        used = {name for stage in self.stages for name in stage.mixture.sources}
        used |= {key.partition("[")[0] for key in (state.drawn if state else ())} & set(recipe.data.sources)
        self.sources = {name: open_source(recipe, root, name) for name in sorted(used)}
        self.sizes = {name: len(source) for name, source in self.sources.items()}
        self.ranks = pool_ranks(recipe)
        self.planner = OrderPlanner(self.stages, self.sizes, recipe.seed, self.measure)
        self._base, self._state = state, state
        self._measured = lru_cache(maxsize=MEASURED_SAMPLES)(self._measure)
        self._read = DecodedCache(READ_BYTES)
        self._kept = DecodedCache(recipe.data.cache_bytes)
        self._fetched: dict[tuple[str, int], Sample | DataError] = {}

    def build(self, step: int) -> PreparedStep:
        """Everything step ``step`` needs: :meth:`draw`, then :meth:`assemble`.

        Raises:
            DataError: a sample is longer than the stage's seq_len, or too many in a row are bad.
        """
        return self.assemble(self.draw(step))

    def draw(self, step: int) -> StepDraw:
        """Which samples the step takes; nothing is decoded.

        Steps may be asked for in any order: forward from the last one is one step's arithmetic, elsewhere the state is
        computed in closed form, or from the start where a nested mixture or packing carries it.

        Raises:
            DataError: as ``OrderPlanner.advance``, or the step lies before the state that the builder was given.
        """
        known = self._state if self._state is not None and self._state.step <= step else self._base
        if self._base is not None and step < self._base.step:
            raise DataError(f"step {step} lies before the data position, which is step {self._base.step}; start anew")
        draw, self._state = self.planner.advance(self.planner.state_at(step, known))
        return draw

    def assemble(self, draw: StepDraw) -> PreparedStep:
        """Rows, plan and decoded media of a drawn step; a pure function of the draw, in whatever process.

        Raises:
            DataError: as :meth:`build`.
        """
        chosen, kept, bad = self._usable(draw)
        stage = self.recipe.stages[self.planner.stage_of(draw.step)[0]]
        samples = [encoded for _, encoded, _ in chosen]
        for name, encoded, _ in chosen:
            if len(encoded) > stage.seq_len:
                raise DataError(
                    f"{name} is {len(encoded)} rows long, stage {stage.name} takes {stage.seq_len}; raise its seq_len"
                )
        groups = _kept_groups(draw.groups, kept) or pack(samples, stage.micro_batches)
        plan = make_plan(
            step=draw.step,
            stage=stage.name,
            names=[name for name, _, _ in chosen],
            samples=samples,
            groups=groups,
            ranks=self.ranks,
            tile_items=self.recipe.data.tile_items,
            counts=count_rows(samples),
        )
        check_plan(plan, self.ranks)
        spans = [(i, k) for group in groups for i in group for k in range(len(samples[i].spans))]
        return PreparedStep(
            plan=plan,
            batches=tuple(pack_rows([samples[i] for i in group]) for group in groups),
            media={item: chosen[i][2][k] for item, (i, k) in enumerate(spans)},
            targets=frozenset(item for item, (i, k) in enumerate(spans) if samples[i].spans[k].target),
            bad=tuple(bad),
            after=draw.after,
        )

    def _usable(self, draw: StepDraw) -> tuple[list[_Chosen], dict[int, int], list[str]]:
        """What could be decoded, where each drawn piece of it stands, and sentences about what could not."""
        plain = self.stages[self.planner.stage_of(draw.step)[0]].plain
        chosen: list[_Chosen] = []
        kept: dict[int, int] = {}
        bad = list(draw.bad)
        self._fetch([self._fixed(piece.ref) for piece in draw.pieces])
        for place, piece in enumerate(draw.pieces):
            good, broken = self._good(piece.ref) if plain else self._alone(piece)
            bad += broken
            if good is not None:
                kept[place] = len(chosen)
                chosen.append(good)
        if not chosen:
            raise DataError(f"step {draw.step} has no sample that can be used; the first of {len(bad)}: {bad[0]}")
        return chosen, kept, bad

    def measure(self, ref: SampleRef) -> SampleRows:
        """Rows of a sample by what they count as; its media headers are read.

        Raises:
            DataError: they cannot be counted.
        """
        return self._measured(self._fixed(ref))

    def _good(self, ref: SampleRef) -> tuple[_Chosen, list[str]]:
        """The sample, or the next good one of its source: skipping is as deterministic as the order."""
        broken: list[str] = []
        size = self.sizes[ref.source]
        for offset in range(min(size, 64)):
            candidate = replace(ref, index=(ref.index + offset) % size)
            try:
                encoded, media = self._decoded(self._fixed(candidate))
            except DataError as error:
                broken.append(f"{candidate}: {error}")
                continue
            return (str(candidate), encoded, media), broken
        raise DataError(f"source {ref.source!r}: {len(broken)} samples in a row cannot be used; first {broken[0]}")

    def _alone(self, piece: Piece) -> tuple[_Chosen | None, list[str]]:
        """The piece, or nothing: where packing fixed the rows, nothing of another length can take a bad one's place."""
        try:
            encoded, media = self._decoded(self._fixed(piece.ref))
        except DataError as error:
            return None, [f"{piece}: {error}"]
        part = slice_sample(encoded, piece.start, piece.stop)
        offsets = {span.offset - piece.start for span in part.spans}
        first = next((k for k, s in enumerate(encoded.spans) if s.offset - piece.start in offsets), 0)
        return (str(piece), part, media[first : first + len(part.spans)]), []

    def _fixed(self, ref: SampleRef) -> SampleRef:
        """The reference by which a sample is kept: the pass matters only where something is left to chance."""
        return ref if self.recipe.data.sources[ref.source].form in CHANCE_FORMS else replace(ref, turn=0)

    def _fetch(self, refs: Sequence[SampleRef]) -> None:
        """Read at once what the step needs and is not kept."""
        missing = [(ref.source, ref.index) for ref in refs if ref not in self._kept and ref not in self._read]
        found = read_together([(self.sources[source], index) for source, index in dict.fromkeys(missing)])
        self._fetched = dict(zip(dict.fromkeys(missing), found, strict=True))

    def _sample(self, ref: SampleRef) -> Sample:
        found = self._fetched.get((ref.source, ref.index))
        if isinstance(found, DataError):
            raise found
        return self.sources[ref.source][ref.index] if found is None else found

    def _encode(self, ref: SampleRef) -> tuple[Sample, EncodedSample]:
        config = self.recipe.data.sources[ref.source]
        chance = chance_of(self.recipe.seed, ref.source, ref.index, ref.turn)
        raw = self._sample(ref)
        try:
            sample = shaped(raw, config.form, chance, config.prompts)
            return sample, encode_sample(sample, self.tokenizer, self.recipe.networks, chance)
        except DataError as error:
            raise self.sources[ref.source].located(ref.index, error) from error

    def _measure(self, ref: SampleRef) -> SampleRows:
        _, encoded = self._read.get(ref, lambda: self._encode(ref), _read_bytes)
        networks = self.recipe.networks
        cost = language_cost(len(encoded)) + sum(media_cost(s.modality, s.cost, networks) for s in encoded.spans)
        return sample_rows(encoded, cost)

    def _decoded(self, ref: SampleRef) -> tuple[EncodedSample, tuple[Any, ...]]:
        value: tuple[EncodedSample, tuple[Any, ...]] = self._kept.get(ref, lambda: self._decode(ref), decoded_bytes)
        return value

    def _decode(self, ref: SampleRef) -> tuple[EncodedSample, tuple[Any, ...]]:
        sample, encoded = self._read.take(ref) or self._encode(ref)
        try:
            return encoded, decode_spans(sample, encoded.spans, self.recipe.networks)
        except DataError as error:
            raise self.sources[ref.source].located(ref.index, error) from error


def tokenizer_file(recipe: Recipe, root: Path) -> Path:
    """The tokenizer.json of a run."""
    return recipe.data.tokenizer or root / "tokenizer.json"


def fitting_tokenizer(recipe: Recipe, root: Path) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        DataError: it cannot be read, lacks a token that samples need, or has more ids than the model has embeddings.
    """
    tokenizer = Tokenizer.load(tokenizer_file(recipe, root))
    vocabulary = recipe.networks.language.vocab_size
    if len(tokenizer) > vocabulary:
        raise DataError(
            f"{tokenizer_file(recipe, root)} has {len(tokenizer)} ids, the model {vocabulary} text embeddings; "
            "choose another tokenizer, or raise model.language.vocab_size"
        )
    return tokenizer


def stage_orders(recipe: Recipe, root: Path) -> list[StageOrder]:
    """Every stage's mixture over the sources that are there; an absent source's share goes to its fallback.

    Raises:
        DataError: a source is absent and names no fallback.
    """
    return [
        StageOrder(
            name=stage.name,
            steps=stage.steps,
            mixture=_over_present(recipe, root, stage.mixture),
            packing=stage.packing,
            sequences=stage.micro_batches,
            rows=stage.sequence_rows,
        )
        for stage in recipe.stages
    ]


def _over_present(recipe: Recipe, root: Path, mixture: Mixture) -> Mixture:
    present = {name: _present(recipe, root, name) for name in mixture.sources}
    if all(name == chosen for name, chosen in present.items()):
        return mixture
    if mixture.counts is None:
        return mixture.with_sources(present)
    counts: dict[str, StepValue] = {}
    for name, value in mixture.counts.items():
        counts[present[name]] = counts[present[name]].plus(value) if present[name] in counts else value
    return Mixture(counts=counts)


def _present(recipe: Recipe, root: Path, name: str) -> str:
    seen = [name]
    while True:
        config = recipe.data.sources.get(seen[-1])
        if config is None:
            raise DataError(f"source {seen[-1]!r} is drawn from but not described; add data.sources.{seen[-1]}.path")
        if is_there(config, root):
            return seen[-1]
        if config.fallback is None or config.fallback in seen:
            path = config.path.replace("{data}", str(root))
            raise DataError(
                f"source {seen[-1]!r} has no {config.split} shards in {path}; build them or name a fallback"
            )
        seen.append(config.fallback)


def open_source(recipe: Recipe, root: Path, name: str) -> FileSource:
    """Open one source of a recipe.

    Raises:
        DataError: its shards cannot be read.
    """
    data = recipe.data
    limits = ReadLimits(timeout_s=data.read_timeout_s, tries=data.read_tries, max_bytes=data.max_sample_bytes)
    return open_configured(data.sources[name], name, root, limits)


def decoded_bytes(decoded: tuple[EncodedSample, tuple[Any, ...]]) -> int:
    """Bytes of a decoded sample's arrays."""
    encoded, media = decoded
    rows = encoded.ids_T5.nbytes + encoded.labels_T5.nbytes + encoded.loss_kind_T.nbytes
    return rows + sum(int(item.nbytes) for item in media)


def _read_bytes(read: tuple[Sample, EncodedSample]) -> int:
    sample, encoded = read
    return sum(len(raw) for raw in sample.media.values()) + decoded_bytes((encoded, ()))


def _kept_groups(groups: tuple[tuple[int, ...], ...] | None, kept: Mapping[int, int]) -> list[list[int]]:
    """Packed groups by the numbers of the pieces that could be decoded; a group without any falls away."""
    found = [[kept[place] for place in group if place in kept] for group in groups or ()]
    return [group for group in found if group]


def pool_ranks(recipe: Recipe) -> PoolRanks:
    """Pool sizes of a recipe."""
    pools = recipe.pools
    return PoolRanks(
        vision=pools.vision.actors,
        audio=pools.audio.actors,
        speech=pools.speech.actors,
        language=pools.language.actors,
        inner_dp=recipe.inner_dp if recipe.placement == "colocate" else 0,
    )


def count_rows(samples: list[EncodedSample]) -> dict[str, int]:
    """Global rows per loss term, and rows in all."""
    counts: dict[str, int] = {"rows": sum(len(sample) for sample in samples)}
    for sample in samples:
        for term, number in loss_counts(sample).items():
            counts[term] = counts.get(term, 0) + number
    return counts


def pack_rows(samples: list[EncodedSample]) -> OmniBatch:
    """Lay samples one after another; attention stays inside each (cu_seqlens)."""
    lengths = [len(sample) for sample in samples]
    return OmniBatch(
        ids_T5=torch.from_numpy(np.concatenate([s.ids_T5 for s in samples])),
        cu_seqlens=(0, *(int(x) for x in np.cumsum(lengths))),
        labels_T5=torch.from_numpy(np.concatenate([s.labels_T5 for s in samples])),
        loss_kind_T=torch.from_numpy(np.concatenate([s.loss_kind_T for s in samples])),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
    )


def tokens_by_modality(prepared: PreparedStep) -> dict[str, int]:
    """Rows of the step by modality, for statistics: placeholders count for their pool, the rest is text."""
    rows = {modality.value: 0 for modality in Modality}
    for item in prepared.plan.items:
        rows[item.modality.value] += item.length
    rows["text"] = prepared.plan.counts["rows"] - sum(rows.values())
    return rows
