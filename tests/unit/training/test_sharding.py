"""Encoders whose ranks hold shares: the bits of the single process, the bytes of a share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process_pools import InProcessPools, trained_alone
from mini_world import STAGES, differing, mini_recipe, write_components, write_world

from omni_ray.config.recipe import Recipe
from omni_ray.training.prepare import StepBuilder

STAGE = STAGES[2] | {"steps": 3, "trainable": [*STAGES[2]["trainable"], "audio"]}
ENCODERS = ("vision", "audio")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "world").mkdir()
    write_world(folder / "world")
    write_components(folder / "components")
    return folder


def recipe_of(base: Path, ranks: int, precision: str = "fp32", shard: str = "hsdp", stages: Any = (STAGE,)) -> Recipe:
    section = {"actors": ranks, "shard": shard, "recompute": "full", "precision": precision}
    pools = dict.fromkeys(ENCODERS, section) | {"language": {"precision": precision}}
    return mini_recipe(base, stages=list(stages), pools=pools)


@pytest.mark.parametrize(("ranks", "precision"), [(2, "fp32"), (3, "bf16")])
def test_shares_train_to_the_bits_of_the_single_process(base: Path, tmp_path: Path, ranks: int, precision: str) -> None:
    """Also after going back to a snapshot, and after loading their checkpoint into a pool of another form."""
    recipe = recipe_of(base, ranks, precision)
    wanted = trained_alone(base, recipe)
    prepared = [StepBuilder(recipe, base / "world").build(step) for step in range(recipe.total_steps)]
    pools = InProcessPools(recipe)
    for number, step in enumerate(prepared, start=1):
        _, made = pools.step(step)
        assert made
        if number == 2:
            pools.save(tmp_path)
            for name in (*ENCODERS, "language"):
                pools.all(name, "keep_snapshot", number)
    assert differing(pools.weights(), wanted) == []
    for name in (*ENCODERS, "language"):
        pools.all(name, "rewind", 2)
    pools.step(prepared[2])
    assert differing(pools.weights(), wanted) == []
    for other in (recipe_of(base, 2, precision), recipe_of(base, 1, precision, "none")):
        loaded = InProcessPools(other, folder=tmp_path)
        loaded.step(StepBuilder(other, base / "world").build(2))
        assert differing(loaded.weights(), wanted) == []


def test_between_steps_a_rank_holds_its_share_alone(base: Path) -> None:
    recipe = recipe_of(base, 4)
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    pools.step(builder.build(0))
    for name in ENCODERS:
        optimizers = [actor.worker.optimizer for actor in pools.pools[name]]
        whole = optimizers[0].bytes_whole()
        shares = []
        for optimizer in optimizers:
            weights = sum(p.untyped_storage().nbytes() for p in optimizer.parameters.values())
            moments = sum(v.nbytes for s in optimizer._adam.state.values() for k, v in s.items() if k != "step")
            assert weights + moments == optimizer.bytes_at_rest(), "what is counted is what is held"
            assert all(parameter.grad is None for parameter in optimizer.parameters.values())
            shares.append(weights + moments)
        assert sum(shares) == whole
        largest = max(optimizer._bytes(parameter) for parameter in optimizer.parameters)
        assert max(shares) <= max(largest, 1.1 * whole / 4), "a parameter is never cut"


def test_a_frozen_pool_keeps_its_network_whole(base: Path) -> None:
    frozen = STAGES[2] | {"steps": 1, "trainable": ["language"]}
    recipe = recipe_of(base, 2, stages=[frozen, STAGE | {"name": "after"}])
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    for step in range(recipe.total_steps):
        pools.step(builder.build(step))
        if step == 0:
            assert all(p.numel() for p in pools.pools["vision"][1].worker.network.parameters())
    assert differing(pools.weights(), trained_alone(base, recipe)) == []
