"""Pretraining of the tiny vision encoder, and the weights that are shipped."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import omni_ray
from omni_ray.config.model import model_preset
from omni_ray.data.tiny_world.pictures import MNIST_TRAIN, SKLEARN_HELD_OUT, draw_picture, load_glyphs
from omni_ray.data.tiny_world.words import all_words
from omni_ray.models.vision_encoder import VisionEncoder
from omni_ray.training.contrastive import ContrastiveModel
from pipelines.components.vision import (
    REAL_DATA_VARIABLE,
    VisionRecipe,
    draw_step,
    id_ranges,
    learning_rate_share,
    main,
    make_optimizers,
    pretrain,
    train_vision,
)
from pipelines.components.vision_batches import BatchPainter, patchify
from pipelines.components.vision_figures import evaluate_vision

SHIPPED = Path(omni_ray.__path__[0]) / "assets" / "vision"


def expanded(ranges: list[str]) -> set[str]:
    """Every id of ``source-0000..source-0009`` ranges."""
    ids = set()
    for text in ranges:
        first, last = (re.fullmatch(r"(\w+)-(\d+)", end) for end in text.split(".."))
        assert first
        assert last
        assert first[1] == last[1]
        ids |= {f"{first[1]}-{number:04d}" for number in range(int(first[2]), int(last[2]) + 1)}
    return ids


def test_stages_bring_large_then_several_then_small_and_moving_digits() -> None:
    painter = BatchPainter(load_glyphs(None).train, seed=0)
    recipe = VisionRecipe(batch=6, steps=100, native_from=0.3, motion_from=0.5)
    steps = [draw_step(painter, recipe, step) for step in range(100)]
    several = [batch.per_picture for batch, _ in steps]
    moving = [bool(batch.directions) for batch, _ in steps]
    assert set(several[:30]) == {1}
    assert set(several[30:50]) == {1, 2, 3}
    assert not any(moving[:50])
    assert moving[50:] == [False, True] * 25
    assert all(len(captions) == 6 == len(batch.digits) for batch, captions in steps)
    assert {word for _, captions in steps for caption in captions for word in caption.split()} == set(all_words())
    inks = [(batch.frames_BT3SS[:, 0].amax(dim=1) > 90).float().mean().item() for batch, _ in steps[50::2]]
    assert min(inks) < 0.5 * max(inks), "small digits cover less"


def test_every_parameter_but_the_projector_has_one_optimiser() -> None:
    model = ContrastiveModel(VisionEncoder(model_preset("tiny").vision), all_words())
    owned = [p for o in make_optimizers(model, VisionRecipe()) for group in o.param_groups for p in group["params"]]
    names = {name for name, p in model.named_parameters() if not any(p is q for q in owned)}
    assert len(owned) == len({id(p) for p in owned})
    assert names == {name for name, _ in model.named_parameters() if name.startswith("encoder.projector")}


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    recipe = VisionRecipe(steps=100, warmup=10, final_lr=0.02)
    shares = [learning_rate_share(step, recipe) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9]
    assert shares[-1] == pytest.approx(0.02)


def test_unreadable_digits_end_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "handwritten-digits"
    folder.mkdir()
    for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        (folder / name).write_bytes(b"no gzip")
    monkeypatch.setenv(REAL_DATA_VARIABLE, str(tmp_path))
    assert main(["--out", str(tmp_path / "out"), "--steps", "1"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "images-idx3-ubyte.gz cannot be read as gzip" in lines[0]


def test_ids_become_ranges() -> None:
    assert id_ranges(["a-0001", "a-0002", "a-0004", "b-0005"]) == ["a-0001..a-0002", "a-0004..a-0004", "b-0005..b-0005"]


def test_training_is_reproducible_and_writes_a_whole_folder(tmp_path: Path) -> None:
    recipe = VisionRecipe(steps=8, batch=4, native_from=0.2, motion_from=0.6, teacher_steps=3)
    cards = [train_vision(tmp_path / name, seed=5, recipe=recipe, limit=8) for name in ("a", "b")]
    first, second = (VisionEncoder.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    fresh = VisionEncoder(model_preset("tiny").vision, seed=5).state_dict()
    assert not torch.equal(fresh["vit.encoder.layers.0.attn.qkv.weight"], first["vit.encoder.layers.0.attn.qkv.weight"])
    assert json.loads((tmp_path / "a" / "card.json").read_text()) == cards[0]
    assert cards[0]["training_data"] == cards[1]["training_data"]
    assert cards[0]["figures"] == cards[1]["figures"]


@pytest.mark.slow
def test_a_short_training_beats_chance_at_colours() -> None:
    glyphs = load_glyphs(None)
    model = ContrastiveModel(VisionEncoder(model_preset("tiny").vision), all_words(), bias=-3.0)
    recipe = VisionRecipe(steps=150, batch=32, motion_from=1.0)
    pretrain(model, BatchPainter(glyphs.train, 0), recipe)
    figures = evaluate_vision(model, glyphs, limit=200)
    # Digits come after some 500 steps; colours are what a short run can show (chance 0.17).
    assert figures["colour_sklearn"]["value"] > 0.6


def test_shipped_weights_are_the_tiny_network_and_were_not_trained_on_held_out_pictures() -> None:
    card = json.loads((SHIPPED / "card.json").read_text())
    assert VisionEncoder.from_pretrained(SHIPPED).config == model_preset("tiny").vision
    assert (SHIPPED / "model.safetensors").stat().st_size < 1_000_000
    trained = expanded(card["training_data"]["ids"])
    assert len(trained) == card["training_data"]["count"]
    sklearn_total = 1797
    held_out = {f"sklearn-{i:04d}" for i in range(sklearn_total - SKLEARN_HELD_OUT, sklearn_total)}
    held_out |= {f"mnist-{i:04d}" for i in range(MNIST_TRAIN, 5000)}
    assert trained
    assert not trained & held_out
    assert expanded(card["held_out"]["ids"]) == held_out
    required = {"digit_mnist": 0.90, "digit_sklearn": 0.88, "colour_mnist": 0.99, "direction_mnist": 0.98}
    assert all(card["figures"][name]["value"] >= value for name, value in required.items())


def test_shipped_weights_separate_held_out_digits() -> None:
    """A linear reading of the shipped features, fitted on training pictures, reads digits it has not seen."""
    folder = os.environ.get(REAL_DATA_VARIABLE)
    glyphs = load_glyphs(Path(folder) if folder else None)
    encoder = VisionEncoder.from_pretrained(SHIPPED)
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for glyph_set, count in ((glyphs.train, 600), (glyphs.held_out_sklearn, 200)):
        drawn = np.stack([draw_picture(rng, image, "green") for image in glyph_set.images[:count]])
        patches, grids = patchify(torch.from_numpy(drawn).float().permute(0, 3, 1, 2)[:, None], encoder.config)
        with torch.no_grad():
            rows.append(encoder.vit_features(patches, grids).view(count, 16, -1).mean(dim=1))
        labels.append(torch.from_numpy(glyph_set.labels[:count]))
    seen, unseen = (torch.nn.functional.pad((x - rows[0].mean(0)) / rows[0].std(0), (0, 1), value=1.0) for x in rows)
    target = torch.nn.functional.one_hot(labels[0], 10).float()
    weights = torch.linalg.solve(seen.T @ seen + 3.0 * torch.eye(seen.shape[1]), seen.T @ target)
    right = ((unseen @ weights).argmax(dim=1) == labels[1]).float().mean().item()
    assert right > 0.75, f"digit accuracy {right:.3f} with a linear reading, chance 0.1"
