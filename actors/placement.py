"""What the pools ask of the cluster, checked before anything starts, and where each rank is put."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from omni_ray.config.parallel import PoolConfig, Resources
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import emit
from omni_ray.types.errors import ResourceError

POOL_NAMES = ("language", "vision", "audio", "speech")
POLL_S = 0.5


def pool_config(recipe: Recipe, pool: str) -> PoolConfig:
    """A pool's section of the recipe."""
    config: PoolConfig = getattr(recipe.pools, pool)
    return config


def actor_options(resources: Resources) -> dict[str, Any]:
    """Ray actor options for a pool's resources."""
    return {"num_cpus": resources.cpu, "num_gpus": resources.gpu, "resources": dict(resources.custom)}


def device_name(resources: Resources) -> str:
    """Where an actor with these resources computes: ``cuda`` with a GPU or a share of one, else ``cpu``."""
    return "cuda" if resources.gpu else "cpu"


def wants(resources: Resources) -> dict[str, float]:
    """Resources of one actor under Ray's names, zeros left out."""
    named = {"CPU": resources.cpu, "GPU": resources.gpu, **resources.custom}
    return {name: amount for name, amount in named.items() if amount}


def asked(recipe: Recipe) -> dict[str, float]:
    """Cluster resources that all pools ask together."""
    total: dict[str, float] = {}
    for pool in POOL_NAMES:
        config = pool_config(recipe, pool)
        for name, amount in wants(config.resources).items():
            total[name] = total.get(name, 0.0) + amount * config.actors
    return total


def spoken(resources: Mapping[str, float]) -> str:
    """``2 CPU, 1 vision_gpu`` for people; Ray's own bookkeeping entries are left out."""
    named = {k: v for k, v in resources.items() if not k.startswith(("node:", "memory", "object_store"))}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items())) or "nothing"


def await_room(recipe: Recipe) -> None:
    """Wait for an autoscaler as long as ``pools.wait_s`` says, then refuse pools that the cluster cannot hold.

    Raises:
        ResourceError: names the resource, what is asked and what is there.
    """
    until = time.monotonic() + recipe.pools.wait_s
    told = False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        short = shortage(recipe, nodes)
        if not short:
            return
        if time.monotonic() >= until:
            break
        if not told:
            emit("waiting_for_cluster", short=short, at_most_s=recipe.pools.wait_s)
            told = True
        time.sleep(POLL_S)
    waited = f" after {recipe.pools.wait_s:g} s" if recipe.pools.wait_s else ""
    raise ResourceError(
        f"{short}{waited}; lower pools.*.actors or pools.*.resources, add nodes, or set pools.wait_s to wait for an "
        "autoscaler"
    )


def shortage(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> str:
    """Why nodes with these resources can never hold the pools; empty where nothing speaks against it.

    The sums may suffice where no single node has room for one actor (or, colocated, for one device's actors).
    """
    for name, amount in asked(recipe).items():
        there = sum(node.get(name, 0.0) for node in nodes)
        if amount > there:
            return f"the pools ask for {amount:g} {name}, yet the cluster has {there:g}"
    for who, wanted in _together(recipe):
        if not any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
            largest = "; ".join(sorted({spoken(node) for node in nodes}))
            return f"{who} asks for {spoken(wanted)} on one node, yet the nodes have {largest}"
    return ""


def _together(recipe: Recipe) -> list[tuple[str, Mapping[str, float]]]:
    """What must stand on one node, with a name for people."""
    if recipe.placement == "colocate":
        return [(f"device {number}", bundle) for number, bundle in enumerate(device_bundles(recipe))]
    return [(f"one {name} actor", wants(pool_config(recipe, name).resources)) for name in POOL_NAMES]


def device_bundles(recipe: Recipe) -> list[dict[str, float]]:
    """Resources of every device of a colocated run: what its ranks ask for together."""
    pools = {name: pool_config(recipe, name) for name in POOL_NAMES}
    bundles: list[dict[str, float]] = [{} for _ in range(max(config.actors for config in pools.values()))]
    for name, config in pools.items():
        for rank in range(config.actors):
            bundle = bundles[device_of(recipe, name, rank)]
            for resource, amount in wants(config.resources).items():
                bundle[resource] = bundle.get(resource, 0.0) + amount
    return [bundle or {"CPU": 0.001} for bundle in bundles]


def device_of(recipe: Recipe, pool: str, rank: int) -> int:
    """Number of the device that a rank sits on, colocated."""
    return rank * recipe.inner_dp if pool == "language" else rank


class Places:
    """Where ranks go: anywhere with their resources, or, colocated, onto the devices of the language replicas.

    Colocated, device r is one bundle of a placement group and holds a rank of every encoder pool; language replica d
    sits on the first device of its inner group (report: world = dp x inner_dp, encoders on every device).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._group: Any = None
        if recipe.placement == "colocate":
            self._group = placement_group(device_bundles(recipe), strategy="PACK")

    def options(self, pool: str, rank: int) -> dict[str, Any]:
        """Ray actor options of a rank."""
        options = actor_options(pool_config(self.recipe, pool).resources)
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=device_of(self.recipe, pool, rank)
            )
        return options

    def close(self) -> None:
        """Give the devices back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
