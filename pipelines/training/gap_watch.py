"""Perplexity gaps during a run: measured through the pools, turned into weights, told to the feeder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from actors.pool import Pool
from omni_ray.config.recipe import Recipe
from omni_ray.data.perplexity_gap import next_factors
from omni_ray.observability.events import emit
from omni_ray.training.gap_measure import is_measured, references, subsets
from pipelines.training.data_root import data_root


class GapWatch:
    """Keeps the weights of stages with ``mixture.gap`` up to date."""

    def __init__(self, recipe: Recipe, pools: Mapping[str, Pool], feeder: Any, factors: Mapping[str, float]) -> None:
        """Start.

        Args:
            recipe: The run.  pools: All four.  feeder: The feeder's handle.
            factors: Of the data position that the run goes on from; empty = none.
        Raises:
            DataError, CheckpointError: a reference that cannot be used.
        """
        self.recipe, self.pools, self.feeder = recipe, pools, feeder
        self.factors, self.stage = dict(factors), -1
        self.references = {
            number: references(recipe, number, data_root(recipe))
            for number, stage in enumerate(recipe.stages)
            if stage.mixture.gap is not None
        }

    def due(self, step: int) -> bool:
        """Whether weights are to be measured before this step is planned."""
        return is_measured(self.recipe, step)

    def update(self, step: int) -> None:
        """Measure every subset with the weights as they are now; all submitted steps must have ended.

        Raises:
            DataError: a log-perplexity that is not finite, or validation samples that are not there.
        """
        stage, inside = self.recipe.stage_at(step)
        number = self.recipe.stages.index(stage)
        gap = stage.mixture.gap
        assert gap is not None
        if inside == gap.every_steps:  # the stage's first: factors of an earlier stage are of other subsets
            self.factors = {}
        names = subsets(self.recipe, number)
        sums = ray.get([self._measure(number, subset) for subset in range(len(names))])
        measured = {name: total / max(rows, 1) for name, (total, rows) in zip(names, sums, strict=True)}
        self.factors = next_factors(self.factors, measured, self.references[number], gap)
        ray.get(self.feeder.weigh.remote(step, self.factors))
        emit("mixture_weights", step=step, stage=stage.name, factors=self.factors, log_perplexity=measured)

    def _measure(self, stage: int, subset: int) -> Any:
        """Handle of (sum, rows) of one subset; media go from the feeder to the pools."""
        rows, *media = self.feeder.validation.options(num_returns=4).remote(stage, subset)
        vision, audio, speech = (
            self.pools[name].actors[0].invoke.remote("features", part)
            for name, part in zip(("vision", "audio", "speech"), media, strict=True)
        )
        return self.pools["language"].actors[0].validate.remote(rows, vision, audio, speech)
