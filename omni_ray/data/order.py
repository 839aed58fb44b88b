"""The order of samples: a pure function of (seed, stages, step); nothing to remember, so nothing to lose.

A source's samples are numbered; draw n of a source is place ``n mod size`` of that source's permutation number
``n div size`` (data/permute.py).  How many draws a step takes is exact arithmetic on the mixture's counts, so a
position is one step number.  Nested mixtures and packing carry a small state instead (data/planner.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omni_ray.config.mixture import StepValue
from omni_ray.data.order_state import OrderState
from omni_ray.data.permute import place
from omni_ray.types.errors import DataError

__all__ = ["Piece", "SampleRef", "StageDraws", "StepDraw", "drawn_before", "place", "samples_of_step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRef:
    """A numbered reference to one sample."""

    source: str
    """Source name in the recipe."""
    index: int
    """Number inside the source."""
    turn: int = 0
    """Which pass over its stream this is; what a sample leaves to chance is drawn afresh in every pass."""

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
    after: OrderState | None = None
    """Where the order stands after the step: what a checkpoint keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDraws:
    """What order needs to know of a stage."""

    steps: int
    """Steps of the stage."""
    mixture: Mapping[str, float | StepValue]
    """Samples per step by source; fractions are met exactly over time."""

    def drawn(self, steps: int) -> dict[str, int]:
        """Samples of each source in the stage's first steps."""
        return {source: int(_value(value).total(steps)) for source, value in self.mixture.items()}


def drawn_before(stages: Sequence[StageDraws], step: int) -> dict[str, int]:
    """How many samples of each source all steps before ``step`` took; the whole data position of a run."""
    total: dict[str, int] = {}
    for stage in stages:
        inside = min(step, stage.steps)
        for source, count in stage.drawn(inside).items():
            total[source] = total.get(source, 0) + count
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
            refs.append(SampleRef(source=source, index=place(seed, source, size, number), turn=number // size))
    return refs


def _value(value: float | StepValue) -> StepValue:
    return value if isinstance(value, StepValue) else StepValue(constant=value)
