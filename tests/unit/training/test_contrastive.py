"""Contrastive pretraining: the loss against its double sum, the text tower, the distillation weight."""

from __future__ import annotations

import math

import pytest
import torch

from omni_ray.config.model import VisionConfig
from omni_ray.models.vision_encoder import VisionEncoder
from omni_ray.training.contrastive import (
    ContrastiveModel,
    distillation_loss,
    distillation_weight,
    pool_columns,
    sigmoid_loss,
)

TINY = VisionConfig(hidden_size=16, num_heads=2, num_layers=1, intermediate_size=24, rope_base=10.0, adaptor_dim=8)
WORDS = ("red", "blue", "one", "two")


def test_sigmoid_loss_equals_the_sum_over_all_pairs() -> None:
    captions = [0, 1, 0, 2, 2, 0]
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(6):
        for j in range(6):
            z = 1.0 if captions[i] == captions[j] else -1.0
            total -= math.log(1 / (1 + math.exp(-z * logits[i, captions[j]].item())))
    assert math.isclose(sigmoid_loss(logits, torch.tensor(captions)).item(), total / 6, rel_tol=1e-5)


def test_a_caption_reads_the_same_alone_and_among_longer_ones() -> None:
    model = ContrastiveModel(VisionEncoder(TINY), WORDS)
    captions = ["two", "red one", "blue", "one red", "blue two"]
    together = model.text_embedding(captions)
    alone = torch.cat([model.text_embedding([caption]) for caption in captions])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[1], together[3])


def test_column_ranges_are_pooled_left_to_right() -> None:
    rows = torch.arange(2 * 2 * 6, dtype=torch.float32)[:, None]
    pooled = pool_columns(rows, [(1, 2, 6)] * 2, 3)
    expected = rows.view(2, 2, 3, 2).mean(dim=(1, 3)).flatten()
    assert pooled.flatten().tolist() == expected.tolist()
    with pytest.raises(ValueError, match="cannot be pooled in 4 equal column ranges"):
        pool_columns(rows, [(1, 2, 6)] * 2, 4)


def test_right_captions_cost_less_and_everything_learns() -> None:
    model = ContrastiveModel(VisionEncoder(TINY), WORDS, bias=-3.0)
    patches = torch.randn(2 * 8, TINY.patch_values, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(model.pooled(patches, [(1, 2, 4)] * 2), ["red one", "blue two"])
        loss.backward()
        optimizer.step()
    silent = {n for n, p in model.named_parameters() if p.grad is None and "projector" not in n}
    assert silent == set()
    pooled = model.pooled(patches, [(1, 2, 4)] * 2)
    assert model.loss(pooled, ["red one", "blue two"]) < 0.5 * model.loss(pooled, ["blue two", "red one"])


def test_distillation_fades_and_needs_direction_alone() -> None:
    assert distillation_weight(0, 100) == 1.0
    assert math.isclose(distillation_weight(20, 100), 0.5)
    assert distillation_weight(40, 100) == distillation_weight(99, 100) == 0.0
    teacher = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert distillation_loss(3.0 * teacher, teacher).item() < 1e-6
    assert math.isclose(distillation_loss(-teacher, teacher).item(), 2.0, rel_tol=1e-5)
    student = torch.zeros(4, 8, requires_grad=True)
    (distillation_loss(student + 1.0, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None
