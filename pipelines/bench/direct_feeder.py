"""A feeder without Ray Data: it builds the step that is asked for, for whatever pool sizes; for benches."""

from __future__ import annotations

from pathlib import Path

from actors.feeder import Feeder
from actors.transport import pack
from omni_ray.balance.step_plan import PoolRanks
from omni_ray.config.recipe import Recipe
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.types.batch import StepPlan


class DirectFeeder(Feeder):
    """Takes the feeder's place; decoded samples stay in memory from plan to plan."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        super().__init__(recipe, root, 0)
        self.builder = StepBuilder(recipe, root)

    def use_ranks(self, ranks: PoolRanks) -> None:
        """Plan for other pool sizes from now on."""
        self.builder.ranks = ranks
        self._ready.clear()

    def plan(self, step: int) -> tuple[StepPlan, tuple[str, ...]]:
        """The plan of a step."""
        prepared = self.builder.build(step)
        batches: tuple = tuple(pack(batch) for batch in prepared.batches)  # as the feeder keeps them
        self._ready[step] = PreparedStep(
            plan=prepared.plan, batches=batches, media=prepared.media, targets=prepared.targets, bad=prepared.bad
        )
        return prepared.plan, prepared.bad
