"""When perplexity gaps are measured, and on what: the validation samples of every subset of a stage."""

from __future__ import annotations

from omni_ray.config.curriculum import Packing
from omni_ray.config.mixture import Mixture, StepValue
from omni_ray.config.recipe import Recipe


def is_measured(recipe: Recipe, step: int) -> bool:
    """Whether gaps are measured before a global step."""
    if step >= recipe.total_steps:
        return False
    stage, inside = recipe.stage_at(step)
    gap = stage.mixture.gap
    return gap is not None and inside > 0 and inside % gap.every_steps == 0


def next_measurement(recipe: Recipe, step: int) -> int:
    """First step after ``step`` whose weights are not known yet; the number of steps where there is none."""
    first = 0
    for stage in recipe.stages:
        gap, last = stage.mixture.gap, first + stage.steps
        if gap is not None and last > step:
            inside = max(step - first, 0) // gap.every_steps * gap.every_steps + gap.every_steps
            if first + inside < last:
                return first + inside
        first = last
    return recipe.total_steps


def subsets(recipe: Recipe, stage: int) -> tuple[str, ...]:
    """Names of a stage's subsets, in order."""
    return tuple(leaf.title for leaf in recipe.stages[stage].mixture.leaves())


def validation_recipe(recipe: Recipe, stage: int) -> Recipe:
    """A recipe whose step ``k`` is the validation batch of a stage's subset ``k``: its source, from the other split."""
    base = recipe.stages[stage]
    gap = base.mixture.gap
    assert gap is not None
    stages, sources = [], {}
    for number, leaf in enumerate(base.mixture.leaves()):
        assert leaf.source is not None
        config = recipe.data.sources[leaf.source]
        sources[leaf.source] = config.model_copy(update={"split": gap.split, "fallback": None})
        mixture = Mixture(counts={leaf.source: StepValue(constant=float(gap.samples))})
        changes = {"name": f"{number}", "steps": 1, "mixture": mixture, "packing": Packing(), "micro_batches": 1}
        stages.append(base.model_copy(update=changes))
    data = recipe.data.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"stages": tuple(stages), "data": data})
