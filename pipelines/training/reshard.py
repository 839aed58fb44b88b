"""Rewriting a checkpoint for other pool sizes or another placement: the same numbers in other files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from actors.placement import pool_config
from actors.snapshot import load_optimizer, write_optimizer
from omni_ray.checkpoint import store
from omni_ray.config.load import load_recipe, save_recipe
from omni_ray.training.networks import POOLS
from omni_ray.types.errors import CheckpointError


def reshard(source: Path, target: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Write ``target`` with the state of ``source``, one shard a rank of the changed recipe.

    Args:
        source: A whole checkpoint.  target: Folder that does not exist yet.
        overrides: Words ``a.b=value`` that change pools, placement or schedule of its recipe.
    Returns:
        Step, and shards by pool.

    Raises:
        CheckpointError: ``source`` is not whole, ``target`` exists, the words change the numbers of the run, or the
            disk is full (nothing is left behind then).
    """
    state = store.read_state(source)
    if target.exists():
        raise CheckpointError(f"{target} exists already; name a folder that does not")
    before = load_recipe(str(source / "recipe.yaml"))
    after = load_recipe(str(source / "recipe.yaml"), list(overrides))
    if before.numbers_fingerprint() != after.numbers_fingerprint():
        raise CheckpointError(
            f"{', '.join(overrides)} changes the numbers of the run; reshard takes pools.*, placement and schedule keys"
        )
    side = target.with_name(f".writing-{target.name}")
    shards = {}
    try:
        with store.written(target.parent, int(state["step"])):
            shutil.rmtree(side, ignore_errors=True)
            shutil.copytree(source, side, ignore=shutil.ignore_patterns("optimizer", store.COMPLETE))
            for name in POOLS:
                shards[name] = pool_config(after, name).actors
                _write_shards(source, side, name, shards[name])
            save_recipe(after, side / "recipe.yaml")
            store.complete(side, target)
    finally:
        shutil.rmtree(side, ignore_errors=True)
    return {"checkpoint": str(target.resolve()), "step": int(state["step"]), "shards": shards}


def _write_shards(source: Path, side: Path, name: str, ranks: int) -> None:
    tensors = load_optimizer(source, name)
    weight_bytes = sum(path.stat().st_size for path in (side / "model" / name).glob("*.safetensors"))
    for rank in range(ranks):
        write_optimizer(side, name, tensors, rank, ranks, weight_bytes)


def shard_names(folder: Path, name: str) -> dict[str, list[str]]:
    """Tensor names of every optimizer shard of a pool."""
    out = {}
    for path in sorted((folder / "optimizer").glob(f"{name}*.safetensors")):
        with safe_open(path, framework="pt") as file:
            out[path.name] = sorted(file.keys())
    return out
