"""When gaps are measured and on what; the pools' figure is the reference's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_world import mini_recipe, write_components, write_world
from tiny_checkpoint import write_tiny_checkpoint

from actors.audio import AudioWorker
from actors.feeder import Feeder
from actors.language import LanguageWorker
from actors.speech import SpeechWorker
from actors.transport import unpack
from actors.vision import VisionWorker
from actors.worker import Rank
from omni_ray.config.load import check_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.inference.omni_model import OmniModel
from omni_ray.training.gap_measure import (
    is_measured,
    log_perplexity,
    next_measurement,
    references,
    subsets,
    validation_recipe,
)
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.errors import CheckpointError

MIXTURE: dict[str, Any] = {
    "modalities": {
        "text": {"share": 12, "blend": [{"source": "text"}]},
        "vision": {"share": 3, "blend": [{"source": "picture"}]},
        "speech": {"share": 5, "blend": [{"source": "audio", "weight": 1}, {"source": "speech", "weight": 1}]},
    },
    "take": {"samples": 6},
    "gap": {"every_steps": 3, "samples": 5, "split": "train"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    base = tmp_path_factory.mktemp("gap")
    (base / "world").mkdir()
    write_world(base / "world")
    write_components(base / "components")
    stages = [
        {"name": "A", "steps": 4, "mixture": {"text": 2}, "trainable": ["language"]},
        {"name": "B", "steps": 8, "mixture": MIXTURE, "trainable": ["language"]},
    ]
    return mini_recipe(base, stages=stages)


def test_steps_before_which_gaps_are_measured(recipe: Recipe) -> None:
    assert [step for step in range(13) if is_measured(recipe, step)] == [7, 10]
    assert [next_measurement(recipe, step) for step in range(12)] == [7] * 7 + [10] * 3 + [12] * 2
    assert subsets(recipe, 1) == ("text", "picture", "audio", "speech")
    check = validation_recipe(recipe, 1)
    assert [dict(s.mixture.model_dump()) for s in check.stages] == [{n: 5.0} for n in subsets(recipe, 1)]


def test_a_checkpoint_is_a_reference(recipe: Recipe, tmp_path: Path) -> None:
    """Its own figure over the validation rows, by its own tokenizer and sizes."""
    root = recipe.data.root
    assert root is not None
    folder = write_tiny_checkpoint(tmp_path)
    stages = [stage.model_dump(mode="json") for stage in recipe.stages]
    stages[1]["mixture"]["gap"]["reference"] = str(folder)
    made = check_recipe(recipe.model_dump(mode="json") | {"stages": stages})
    found = references(made, 1, root)
    assert set(found) == set(subsets(recipe, 1))
    vocabulary = made.networks.language.vocab_size
    assert all(0.5 * math.log(vocabulary) < value < 1.5 * math.log(vocabulary) for value in found.values())
    (folder / "COMPLETE").unlink()
    with pytest.raises(CheckpointError):
        references(made, 1, root)


def test_workers_measure_what_the_reference_measures(recipe: Recipe) -> None:
    root = recipe.data.root
    assert root is not None
    kinds = {"vision": VisionWorker, "audio": AudioWorker, "speech": SpeechWorker, "language": LanguageWorker}
    workers: dict[str, Any] = {name: kind(recipe, Rank(pool=name)) for name, kind in kinds.items()}
    for worker in workers.values():
        worker.build()
        worker.set_stage(1)
    feeder, builder = Feeder(recipe, root, 0), StepBuilder(validation_recipe(recipe, 1), root)
    for subset, name in enumerate(subsets(recipe, 1)):
        (batch, context), *media = feeder.validation(1, subset)
        vision, audio, codes = (
            [row.numpy() if isinstance(row, torch.Tensor) else row for row in workers[kind].features(part)]
            for kind, part in zip(("vision", "audio", "speech"), media, strict=True)
        )
        total, rows = workers["language"].validate((unpack(batch), context), (vision, audio), codes)
        oracle = Reference(recipe.model_copy(update={"stages": recipe.stages[1:]}))
        losses = oracle.step(builder.build(subset)).losses
        counts = context.counts
        terms = [t for t in ("text", "audio_text", "vision") if counts.get(t)]
        assert rows == sum(counts[t] for t in terms) > 0, name
        wanted = sum(losses[t] * counts[t] for t in terms) / rows
        assert total / rows == pytest.approx(wanted, rel=1e-5), name
        alone = OmniModel(
            language=workers["language"].network,
            vision=workers["vision"].network,
            audio=workers["audio"].network,
            codec=workers["speech"].network,
            tokenizer=builder.tokenizer,
        )
        assert log_perplexity(alone, builder.build(subset)) == pytest.approx(wanted, rel=1e-5), name
        before = workers["language"].take_statistics()
        assert not before[0].any(), "training statistics stay untouched"
