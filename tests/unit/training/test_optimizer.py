"""Ordered sums, one norm over all pools, schedules of the rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from omni_ray.config.curriculum import LearningRate, Stage
from omni_ray.config.training import OptimizerConfig
from omni_ray.training.optimizer import PoolOptimizer, part_of, rates

STAGE = Stage(name="S2", steps=10, mixture={"text": 1}, trainable=("vision", "vision_projector"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 2)
        self.projector = nn.Linear(2, 2)


def optimizer(net: Net, clip: float = 0.0) -> PoolOptimizer:
    made = PoolOptimizer("vision", net, OptimizerConfig(clip_norm=clip))
    assert made.set_stage(STAGE)
    return made


def loss_of(net: Net, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return net.projector(net.body(torch.randn(5, 3, generator=generator))).square().sum()


def test_terms_of_many_ranks_add_to_the_bits_of_one() -> None:
    one, many = Net(), Net()
    single, spread = optimizer(one), optimizer(many)
    for number in range(5):
        loss_of(one, number).backward()
    terms = {}
    for number in (3, 0, 4, 1, 2):  # whichever rank made them, in whatever order
        loss_of(many, number).backward()
        terms[number] = spread.take_term()
    spread.put_terms(terms[number] for number in sorted(terms))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert single.norm_squared() == spread.norm_squared()


def test_frozen_parts_keep_their_bits() -> None:
    net = Net()
    made = PoolOptimizer("vision", net, OptimizerConfig())
    made.set_stage(STAGE.model_copy(update={"trainable": ("vision_projector",)}))
    before = net.body.weight.detach().clone()
    moved = net.projector.weight.detach().clone()
    loss_of(net, 1).backward()
    made.apply([made.norm_squared()], {"vision": 1.0, "vision_projector": 0.1})
    assert torch.equal(net.body.weight, before)
    assert not torch.equal(net.projector.weight, moved)


def test_clip_uses_the_norm_over_all_pools() -> None:
    net = Net()
    made = optimizer(net, clip=1.0)
    loss_of(net, 1).backward()
    mine = made.norm_squared()
    norm, stepped = made.apply([mine, 16.0], {"vision": 0.0, "vision_projector": 0.0})
    assert stepped
    assert norm == math.sqrt(mine + 16.0)


def test_rates_warm_up_and_fall() -> None:
    lr = LearningRate(peak=1.0, end=0.1, warmup_steps=4, vision_scale=0.3, audio_scale=0.2)
    assert [rates(lr, step, 14)["language"] for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rates(lr, 9, 14)["language"] == pytest.approx(0.55)
    assert rates(lr, 9, 14)["vision"] == pytest.approx(0.3 * 0.55)
    cosine = lr.model_copy(update={"shape": "cosine"})
    assert rates(cosine, 9, 14)["language"] == pytest.approx(0.55)
    assert rates(cosine, 13, 14)["language"] < rates(lr, 13, 14)["language"]


@pytest.mark.parametrize(
    ("pool", "name", "part"),
    [
        ("language", "model.norm.weight", "language"),
        ("language", "audio_heads.0.weight", "audio_heads"),
        ("vision", "projector.p0.0.weight", "vision_projector"),
        ("audio", "encoder.x", "audio"),
    ],
)
def test_parts(pool: str, name: str, part: str) -> None:
    assert part_of(pool, name) == part
