"""When perplexity gaps are measured, and on what: the validation samples of every subset of a stage."""

from __future__ import annotations

from pathlib import Path

import torch

from omni_ray.config.curriculum import LossWeights, Packing
from omni_ray.config.mixture import GapConfig, Mixture, StepValue
from omni_ray.config.recipe import Recipe
from omni_ray.data.chat import fill_codec_rows
from omni_ray.data.perplexity_gap import read_reference
from omni_ray.inference.omni_model import OmniModel, load_model
from omni_ray.training.loss import TERMS, objective, term_scales
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.types.modality import Modality

TEXT_TERMS = ("text", "audio_text", "vision")
"""Loss terms of the text head whose rows make a perplexity; pads beside codec rows are left out."""


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
    stages = []
    for number, leaf in enumerate(base.mixture.leaves()):
        assert leaf.source is not None
        mixture = Mixture(counts={leaf.source: StepValue(constant=float(gap.samples))})
        changes = {"name": f"{number}", "steps": 1, "mixture": mixture, "packing": Packing(), "micro_batches": 1}
        stages.append(base.model_copy(update=changes))
    sources = {name: source.model_copy(update={"split": gap.split}) for name, source in recipe.data.sources.items()}
    data = recipe.data.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"stages": tuple(stages), "data": data})


def references(recipe: Recipe, stage: int, root: Path) -> dict[str, float]:
    """Reference log-perplexities of a stage's subsets: from the recipe's file, or measured with its checkpoint.

    Raises:
        DataError: a file that cannot be used, or no validation samples.
        CheckpointError: a folder that is no checkpoint.
    """
    gap = recipe.stages[stage].mixture.gap
    assert isinstance(gap, GapConfig)
    names = subsets(recipe, stage)
    if gap.reference is None or not Path(gap.reference).is_dir():
        return read_reference(gap, names)
    folder = Path(gap.reference)
    model = load_model(folder)
    check = validation_recipe(recipe, stage)
    data = check.data.model_copy(update={"tokenizer": folder / "tokenizer.json"})
    builder = StepBuilder(check.model_copy(update={"model": model.config, "data": data}), root)
    return {name: log_perplexity(model, builder.build(number)) for number, name in enumerate(names)}


@torch.no_grad()
def log_perplexity(model: OmniModel, prepared: PreparedStep) -> float:
    """Mean cross-entropy of the text head on a step of one micro-batch, in one process."""
    batch = prepared.batches[0]
    ids_T5, labels_T5 = batch.ids_T5.clone(), batch.labels_T5.clone()
    placed = []
    for modality in Modality:
        items = [item for item in prepared.plan.items if item.modality == modality]
        for item, rows in zip(items, model.encode(modality, [prepared.media[i.id] for i in items]), strict=True):
            if modality == Modality.SPEECH:
                fill_codec_rows(ids_T5, labels_T5, item.offset, rows, target=item.id in prepared.targets)
            else:
                placed.append((item, rows))
    rows_TD = model.language.embed_rows(ids_T5)
    for item, rows in placed:
        rows_TD[item.offset : item.offset + item.length] = rows
    output = model.language(rows_TD, batch.cu_seqlens, batch.positions)
    _, sums = objective(model.language, output.hidden_TD, batch, term_scales(LossWeights(), prepared.plan.counts))
    total = sum(float(sums[TERMS.index(term)]) for term in TEXT_TERMS)
    return total / max(1, sum(prepared.plan.counts.get(term, 0) for term in TEXT_TERMS))
