"""Every worker: builds, keeps the seam's methods, saves and loads to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mini_world import mini_recipe, write_components, write_world

from actors.pool_actor import make_worker
from actors.worker import Rank
from omni_ray.config.recipe import Recipe
from omni_ray.training.networks import POOLS
from omni_ray.types.seams import Worker


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    base = tmp_path_factory.mktemp("workers")
    (base / "world").mkdir()
    write_world(base / "world")
    write_components(base / "components")
    return mini_recipe(base)


@pytest.mark.parametrize("pool", [*POOLS, "speech"])
def test_saved_worker_loads_to_the_same_bits(recipe: Recipe, pool: str, tmp_path: Path) -> None:
    worker = make_worker(recipe, Rank(pool=pool))
    assert isinstance(worker, Worker)
    worker.build()
    live = worker.set_stage(2)
    assert live == (pool in {"language", "vision", "audio"}), "stage S2 trains these"
    if live:  # one optimizer step, so that there is state to keep
        for parameter in worker.optimizer.parameters.values():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.01)
        norm, made = worker.step(5, [worker.finish([])])
        assert made
        assert norm > 0
    worker.save(tmp_path)
    again = make_worker(recipe, Rank(pool=pool))
    again.load(tmp_path)
    first, second = worker.network.state_dict(), again.network.state_dict()
    if pool == "speech":  # shipped in half precision: loading twice is what must agree
        again.save(tmp_path / "twice")
        again.load(tmp_path / "twice")
        first, second = second, again.network.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    if live:
        ours, theirs = worker.optimizer.state_tensors(), again.optimizer.state_tensors()
        assert ours.keys() == theirs.keys() != set()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("pool", POOLS)
def test_non_finite_norm_skips_the_step(recipe: Recipe, pool: str) -> None:
    worker = make_worker(recipe, Rank(pool=pool))
    worker.build()
    worker.set_stage(2)
    before = {name: value.clone() for name, value in worker.network.state_dict().items()}
    for parameter in worker.optimizer.parameters.values():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    _, made = worker.step(5, [worker.finish([]), float("nan")])
    assert not made
    assert all(torch.equal(value, before[name]) for name, value in worker.network.state_dict().items())
