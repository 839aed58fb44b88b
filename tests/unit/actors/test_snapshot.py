"""A worker's state: copies of its own, back to the same bits, shards that any number of ranks may write and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actors.snapshot import BackgroundSave, Snapshots, WorkerState, load_optimizer, same_state, write_optimizer
from omni_ray.config.curriculum import LearningRate, Stage
from omni_ray.config.training import OptimizerConfig
from omni_ray.training.optimizer import PoolOptimizer, rates
from omni_ray.types.errors import CheckpointError


def trained() -> tuple[nn.Module, PoolOptimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = PoolOptimizer("language", network, OptimizerConfig())
    optimizer.set_stage(Stage(name="S", steps=9, mixture={"text": 1.0}, trainable=("language",)))
    step(network, optimizer)
    return network, optimizer


def step(network: nn.Module, optimizer: PoolOptimizer) -> None:
    network(torch.ones(3, 4)).square().sum().backward()
    optimizer.apply([optimizer.norm_squared()], rates(LearningRate(), 1, 9))


def test_restored_state_goes_on_with_the_same_bits() -> None:
    network, optimizer = trained()
    kept = WorkerState.of(network, optimizer)
    step(network, optimizer)
    expected = WorkerState.of(network, optimizer)
    assert same_state(kept, expected) != [], "a step changes the state, and the copy did not follow"
    kept.restore(network, optimizer)
    assert same_state(WorkerState.of(network, optimizer), kept) == []
    step(network, optimizer)
    assert same_state(WorkerState.of(network, optimizer), expected) == []


def test_state_of_before_the_first_step_forgets_the_moments() -> None:
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    optimizer = PoolOptimizer("language", network, OptimizerConfig())
    optimizer.set_stage(Stage(name="S", steps=9, mixture={"text": 1.0}, trainable=("language",)))
    fresh = WorkerState.of(network, optimizer)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.apply([optimizer.norm_squared()], rates(LearningRate(), 1, 9))
    assert optimizer.state_tensors() != {}
    fresh.restore(network, optimizer)
    assert optimizer.state_tensors() == {}


def test_snapshots_are_dropped_on_either_side() -> None:
    network, optimizer = trained()
    snapshots = Snapshots()
    for number in (4, 8, 12):
        snapshots.keep(number, WorkerState.of(network, optimizer))
    snapshots.drop_before(8)
    snapshots.drop_after(8)
    assert snapshots.get(8).rope_base is None
    with pytest.raises(CheckpointError, match=r"no snapshot of step 12 is in memory; there are \[8\]"):
        snapshots.get(12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards_of_any_number_of_ranks_load_to_the_whole(ranks: int, tmp_path: Path) -> None:
    tensors = trained()[1].state_tensors()
    for rank in range(ranks):
        write_optimizer(tmp_path, "language", tensors, rank, ranks, weight_bytes=100)
    loaded = load_optimizer(tmp_path, "language")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    if ranks > 1:
        (tmp_path / "optimizer" / f"language-00002-of-{ranks:05d}.safetensors").unlink()
        with pytest.raises(CheckpointError, match=f"holds {ranks - 1} of {ranks} shards of language; use another"):
            load_optimizer(tmp_path, "language")


def test_a_failed_background_save_tells_why(tmp_path: Path) -> None:
    saving = BackgroundSave()
    assert saving.status(wait=True) == "done"

    def full() -> None:
        raise CheckpointError("language, rank 0: the disk is full")

    saving.start(full)
    assert saving.status(wait=True) == "language, rank 0: the disk is full"
    saving.start(lambda: (tmp_path / "x").write_text("y") and None)
    assert saving.status(wait=True) == "done"
