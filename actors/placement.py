"""What the pools ask of the cluster, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from omni_ray.config.parallel import PoolConfig, Resources
from omni_ray.config.recipe import Recipe
from omni_ray.types.errors import ResourceError

POOL_NAMES = ("language", "vision", "audio", "speech")


def pool_config(recipe: Recipe, pool: str) -> PoolConfig:
    """A pool's section of the recipe."""
    config: PoolConfig = getattr(recipe.pools, pool)
    return config


def actor_options(resources: Resources) -> dict[str, Any]:
    """Ray actor options for a pool's resources."""
    return {"num_cpus": resources.cpu, "num_gpus": resources.gpu, "resources": dict(resources.custom)}


def asked(recipe: Recipe) -> dict[str, float]:
    """Cluster resources that all pools ask together."""
    total: dict[str, float] = {}
    for pool in POOL_NAMES:
        config = pool_config(recipe, pool)
        wants = {"CPU": config.resources.cpu, "GPU": config.resources.gpu, **config.resources.custom}
        for name, amount in wants.items():
            if amount:
                total[name] = total.get(name, 0.0) + amount * config.actors
    return total


def spoken(resources: Mapping[str, float]) -> str:
    """``2 CPU, 1 vision_gpu`` for people; Ray's own bookkeeping entries are left out."""
    named = {k: v for k, v in resources.items() if not k.startswith(("node:", "memory", "object_store"))}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items())) or "nothing"


def check_fits(recipe: Recipe) -> None:
    """Refuse pools that the running cluster cannot hold.

    Raises:
        ResourceError: names the resource, what is asked and what is there.
    """
    there = ray.cluster_resources()
    for name, amount in asked(recipe).items():
        if amount > there.get(name, 0.0):
            raise ResourceError(
                f"the pools ask for {amount:g} {name}, yet the cluster has {there.get(name, 0.0):g}; "
                f"lower pools.*.actors or pools.*.resources, or add nodes"
            )
