"""Resharding: the same state in other files, read back by any number of ranks; refusals leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mini_world import mini_recipe, write_components, write_world

from actors.pool_actor import make_worker
from actors.snapshot import same_state
from actors.worker import Rank
from omni_ray.checkpoint import store
from omni_ray.config.load import load_recipe, save_recipe
from omni_ray.training.networks import POOLS
from omni_ray.types.errors import CheckpointError
from pipelines.training.reshard import reshard, shard_names


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("reshard")
    (base / "world").mkdir()
    write_world(base / "world")
    write_components(base / "components")
    recipe = mini_recipe(base)
    with store.writing(base / "checkpoints", 5) as folder:
        for pool in POOLS:
            worker = make_worker(recipe, Rank(pool=pool))
            worker.build()
            worker.set_stage(2)
            for parameter in worker.optimizer.parameters.values():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 0.01)
            worker.step(5, [worker.finish([])])
            worker.save(folder)
        save_recipe(recipe, folder / "recipe.yaml")
        store.write_state(folder, {"step": 5})
    return base / "checkpoints" / "step-0000005"


def test_resharded_state_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    words = ["pools.language.actors=3", "pools.vision.actors=2"]
    found = reshard(checkpoint, tmp_path / "step-0000005", words)
    assert found["shards"] == {"language": 3, "vision": 2, "audio": 1}
    assert store.read_state(tmp_path / "step-0000005") == {"step": 5}
    recipe = load_recipe(str(tmp_path / "step-0000005" / "recipe.yaml"))
    assert recipe.pools.language.actors == 3
    shards = shard_names(tmp_path / "step-0000005", "language")
    assert len(shards) == 3
    assert all(list(shards.values())[1:]), "every rank writes as many bytes; the first writes the weights besides"
    for pool in POOLS:
        ours, theirs = make_worker(recipe, Rank(pool=pool)), make_worker(recipe, Rank(pool=pool))
        ours.load(checkpoint)
        theirs.load(tmp_path / "step-0000005")
        assert same_state(ours.state(), theirs.state()) == []
        assert theirs.state().optimizer != {}


def test_what_cannot_be_resharded_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="seed=4 changes the numbers of the run; reshard takes pools"):
        reshard(checkpoint, tmp_path / "a", ["seed=4"])
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="exists already; name a folder that does not"):
        reshard(checkpoint, tmp_path / "b", [])
    with pytest.raises(CheckpointError, match="does not exist"):
        reshard(tmp_path / "none", tmp_path / "c", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
