"""Pools that compute in bf16 over fp32 masters: the same bits as the single process, whatever their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_pools import InProcessPools, trained_alone
from mini_world import STAGES, differing, mini_recipe

from omni_ray.config.recipe import Recipe
from omni_ray.training.networks import POOLS
from omni_ray.training.prepare import StepBuilder

BF16 = {name: {"precision": "bf16"} for name in POOLS}
MIXED = {"language": {"precision": "bf16"}, "vision": {"precision": "fp32"}, "audio": {"precision": "bf16"}}
STAGE = STAGES[2] | {"steps": 2, "trainable": [*STAGES[2]["trainable"], "audio"]}


def recipe_of(base: Path, pools: dict[str, Any], **changes: Any) -> Recipe:
    return mini_recipe(base, stages=[STAGE], pools=pools, **changes)


@pytest.mark.parametrize("precision", [BF16, MIXED], ids=["bf16", "mixed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_pools_equal_the_reference_bit_for_bit(base: Path, precision: dict[str, Any], ranks: int) -> None:
    wanted = trained_alone(base, recipe_of(base, precision))
    assert all(value.dtype == torch.float32 for value in wanted.values() if value.is_floating_point())
    sized = {name: section | {"actors": ranks, "recompute": "full"} for name, section in precision.items()}
    recipe = recipe_of(base, sized, schedule={"num_chunks": ranks})
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    for step in range(recipe.total_steps):
        _, made = pools.step(builder.build(step))
        assert made
    for rank in range(ranks):
        assert differing(pools.weights(rank), wanted) == []


def test_saved_masters_and_snapshots_go_on_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    """Two ranks write after the first step, one rank goes on from their files; a rewound rank makes the step again."""
    wanted = trained_alone(base, recipe_of(base, BF16))
    two = recipe_of(base, {name: section | {"actors": 2} for name, section in BF16.items()})
    pools, builder = InProcessPools(two), StepBuilder(two, base / "world")
    pools.step(builder.build(0))
    for name in POOLS:
        pools.all(name, "save", tmp_path)
        pools.all(name, "keep_snapshot", 1)
    pools.pools["speech"][0].invoke("save", tmp_path)
    pools.step(builder.build(1))
    for name in POOLS:
        pools.all(name, "rewind", 1)
    pools.step(builder.build(1))
    assert differing(pools.weights(1), wanted) == []
    one = recipe_of(base, BF16)
    loaded = InProcessPools(one, folder=tmp_path)
    loaded.step(StepBuilder(one, base / "world").build(1))
    assert differing(loaded.weights(), wanted) == []
    assert differing(loaded.weights(), trained_alone(base, recipe_of(base, {}))) != [], "fp32 gives other bits"


def test_what_is_computed_in_bf16_and_what_is_not(base: Path) -> None:
    pools = InProcessPools(recipe_of(base, BF16))
    for name in POOLS:
        worker = pools.pools[name][0].worker
        dtypes = {key: value.dtype for key, value in worker.network.named_parameters()}
        kept = sorted(key for key, dtype in dtypes.items() if dtype == torch.float32)
        assert all(".router." in key for key in kept), kept
        assert bool(kept) == (name == "language")
        assert len(kept) < len(dtypes)
        assert {value.dtype for value in worker.network.buffers() if value.is_floating_point()} <= {torch.float32}
        assert {master.dtype for master in worker.optimizer.masters.values()} == {torch.float32}


def test_small_updates_are_not_lost(base: Path) -> None:
    """A step below half of bf16's spacing leaves the rounded weight alone and stays in the master."""
    recipe = recipe_of(base, BF16)
    optimizer = InProcessPools(recipe).pools["vision"][0].worker.optimizer
    optimizer.set_stage(recipe.stages[0])
    name, parameter = next((n, p) for n, p in optimizer.parameters.items() if n.endswith("qkv.weight"))
    before, rounded = optimizer.masters[name].clone(), parameter.detach().clone()
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.apply([optimizer.norm_squared()], dict.fromkeys(("vision", "vision_projector"), 1e-7))
        optimizer.clear()
    moved = optimizer.masters[name] - before
    assert 0 < float(moved.abs().max()) < 1e-6
    assert float((parameter != rounded).float().mean()) < 0.01
