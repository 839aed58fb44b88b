"""The order of samples: a pure function of (seed, stages, step); nothing to remember, so nothing to lose.

A source's samples are numbered; draw n of a source is place ``n mod size`` of that source's permutation number
``n div size``.  How many draws a step takes is exact arithmetic on the mixture's weights, so a position is one step
number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRef:
    """A numbered reference to one sample."""

    source: str
    """Source name in the recipe."""
    index: int
    """Number inside the source."""

    def __str__(self) -> str:
        return f"{self.source}:{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A sample's rows in one packed sequence: all of them, or a stretch where packing cut it."""

    ref: SampleRef
    """Whose rows."""
    start: int = 0
    """First row."""
    stop: int | None = None
    """Row after the last; None = to the end."""

    def __str__(self) -> str:
        if self.start == 0 and self.stop is None:
            return str(self.ref)
        return f"{self.ref}[{self.start}:{'' if self.stop is None else self.stop}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDraw:
    """What a step is made of, known by arithmetic before anything is decoded; small, so it may travel."""

    step: int
    """Global step."""
    pieces: tuple[Piece, ...]
    """In the order in which they were drawn."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Places in ``pieces`` of every micro-batch, where packing fixed them; None = groups of equal language work."""
    bad: tuple[str, ...] = ()
    """Draws that were skipped because their rows cannot even be counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDraws:
    """What order needs to know of a stage."""

    steps: int
    """Steps of the stage."""
    mixture: Mapping[str, float]
    """Samples per step by source; fractions are met exactly over time."""


def drawn_before(stages: Sequence[StageDraws], step: int) -> dict[str, int]:
    """How many samples of each source all steps before ``step`` took; the whole data position of a run."""
    total: dict[str, int] = {}
    for stage in stages:
        inside = min(step, stage.steps)
        for source, weight in stage.mixture.items():
            total[source] = total.get(source, 0) + _floor(inside, weight)
        step -= inside
    return total


def samples_of_step(stages: Sequence[StageDraws], step: int, sizes: Mapping[str, int], seed: int) -> list[SampleRef]:
    """The samples of a global step, sources in the mixture's order.

    Args:
        stages: All stages of the recipe, in order.  step: Global step.
        sizes: Samples per source.  seed: The recipe's seed.

    Raises:
        DataError: the step lies beyond the last stage, or a source is empty.
    """
    before = drawn_before(stages, step)
    after = drawn_before(stages, step + 1)
    if step < 0 or before == after:
        raise DataError(f"step {step} draws no samples; the stages end at step {sum(s.steps for s in stages)}")
    refs = []
    for source in after:
        size = sizes.get(source, 0)
        if size < 1:
            raise DataError(f"source {source!r} holds no samples; build or point to its shards")
        for number in range(before.get(source, 0), after[source]):
            refs.append(SampleRef(source=source, index=place(seed, source, size, number)))
    return refs


def place(seed: int, source: str, size: int, number: int) -> int:
    """Which sample draw ``number`` of a source is."""
    return int(_permutation(seed, source, size, number // size)[number % size])


@lru_cache(maxsize=64)
def _permutation(seed: int, source: str, size: int, epoch: int) -> NDArray[np.int64]:
    digest = hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)


def _floor(steps: int, weight: float) -> int:
    # Weights are written as decimals; Fraction(str) keeps 0.1 exactly a tenth on every machine.
    return int(Fraction(str(weight)) * steps)
