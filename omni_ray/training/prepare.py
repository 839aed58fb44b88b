"""From a step number to everything the step needs: samples, rows, plan, decoded media. One process, pure, no Ray.

The feeder maps this function through Ray Data; tests, the reference and `data preview` call it directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_ray.balance.step_plan import PoolRanks, check_plan, make_plan, pack
from omni_ray.config.recipe import Recipe
from omni_ray.data.chat import encode_sample, loss_counts
from omni_ray.data.decoded_cache import DecodedCache
from omni_ray.data.media import decode_span
from omni_ray.data.order import Piece, SampleRef, StageDraws, StepDraw, samples_of_step
from omni_ray.data.sources import FileSource, ReadLimits, is_there, open_configured
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.batch import OmniBatch, StepPlan
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, Sample


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
    """Samples that could not be decoded and were replaced by the next one of their source."""


class StepBuilder:
    """Builds prepared steps of a recipe; holds the sources' indices and a cache of decoded samples."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self.recipe = recipe
        self.root = root
        self.tokenizer = Tokenizer.load(root / "tokenizer.json")
        self.draws = stage_draws(recipe, root)
        used = {name for draws in self.draws for name in draws.mixture}
        self.sources = {name: open_source(recipe, root, name) for name in sorted(used)}
        self.sizes = {name: len(source) for name, source in self.sources.items()}
        self.ranks = pool_ranks(recipe)
        self._kept = DecodedCache(recipe.data.cache_bytes)

    def build(self, step: int) -> PreparedStep:
        """Everything step ``step`` needs: :meth:`draw`, then :meth:`assemble`.

        Raises:
            DataError: a sample is longer than the stage's seq_len, or too many in a row are bad.
        """
        return self.assemble(self.draw(step))

    def draw(self, step: int) -> StepDraw:
        """Which samples the step takes; arithmetic, nothing is decoded."""
        refs = samples_of_step(self.draws, step, self.sizes, self.recipe.seed)
        return StepDraw(step=step, pieces=tuple(Piece(ref=ref) for ref in refs))

    def assemble(self, draw: StepDraw) -> PreparedStep:
        """Rows, plan and decoded media of a drawn step; a pure function of the draw, in whatever process.

        Raises:
            DataError: as :meth:`build`.
        """
        stage, _ = self.recipe.stage_at(draw.step)
        chosen, bad = [], list(draw.bad)
        for piece in draw.pieces:
            good, broken = self._good(piece.ref)
            chosen.append(good)
            bad += broken
        samples = [encoded for _, encoded, _ in chosen]
        for ref, encoded, _ in chosen:
            if len(encoded) > stage.seq_len:
                raise DataError(
                    f"{ref} is {len(encoded)} rows long, stage {stage.name} takes {stage.seq_len}; raise its seq_len"
                )
        groups = draw.groups or pack(samples, stage.micro_batches)
        plan = make_plan(
            step=draw.step,
            stage=stage.name,
            names=[str(ref) for ref, _, _ in chosen],
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
        )

    def _good(self, ref: SampleRef) -> tuple[tuple[SampleRef, EncodedSample, tuple[Any, ...]], list[str]]:
        """The sample, or the next good one of its source: skipping is as deterministic as the order."""
        broken: list[str] = []
        size = self.sizes[ref.source]
        for offset in range(min(size, 64)):
            candidate = SampleRef(source=ref.source, index=(ref.index + offset) % size)
            try:
                encoded, media = self._decoded(candidate)
            except DataError as error:
                broken.append(f"{candidate}: {error}")
                continue
            return (candidate, encoded, media), broken
        raise DataError(f"source {ref.source!r}: {len(broken)} samples in a row cannot be used; first {broken[0]}")

    def _decoded(self, ref: SampleRef) -> tuple[EncodedSample, tuple[Any, ...]]:
        value: tuple[EncodedSample, tuple[Any, ...]] = self._kept.get(ref, lambda: self._decode(ref), decoded_bytes)
        return value

    def _decode(self, ref: SampleRef) -> tuple[EncodedSample, tuple[Any, ...]]:
        sample: Sample = self.sources[ref.source][ref.index]
        networks = self.recipe.networks
        encoded = encode_sample(sample, self.tokenizer, networks)
        memory: dict[str, Any] = {}
        return encoded, tuple(decode_span(sample, span, networks, memory) for span in encoded.spans)


def stage_draws(recipe: Recipe, root: Path) -> list[StageDraws]:
    """Steps and mixture of every stage over the sources that are there; an absent source's share goes to its fallback.

    Raises:
        DataError: a source is absent and names no fallback.
    """
    draws = []
    for stage in recipe.stages:
        mixture: dict[str, float] = {}
        for name, weight in stage.mixture.items():
            chosen = _present(recipe, root, name)
            mixture[chosen] = mixture.get(chosen, 0.0) + weight
        draws.append(StageDraws(steps=stage.steps, mixture=mixture))
    return draws


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


def pool_ranks(recipe: Recipe) -> PoolRanks:
    """Pool sizes of a recipe."""
    pools = recipe.pools
    return PoolRanks(
        vision=pools.vision.actors,
        audio=pools.audio.actors,
        speech=pools.speech.actors,
        language=pools.language.actors,
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
