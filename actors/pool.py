"""Pools of Ray actors, each holding one plain worker: started, placed, watched."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.placement import Places, asked, await_room, device_name, pool_config, spoken
from actors.pool_actor import PoolActor
from actors.worker import Rank
from omni_ray.config.parallel import is_sharded
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import emit
from omni_ray.types.errors import ResourceError

START_TIMEOUT_S = 300
"""Longest wait for actors to be placed and to build their networks; an autoscaler's new node fits into it."""
TOLD_AFTER_S = 30.0
"""After which the run says which ranks still wait for room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The actors of one modality."""

    name: str
    """language, vision, audio or speech."""
    actors: tuple[Any, ...]
    """Ray actor handles by rank."""

    def __len__(self) -> int:
        return len(self.actors)

    def all(self, method: str, *args: Any) -> list[Any]:
        """Submit a worker method on every rank; returns the handles."""
        return [actor.invoke.remote(method, *args) for actor in self.actors]

    def stop(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)


def start_pools(
    recipe: Recipe,
    names: Sequence[str],
    resume_from: Path | None = None,
    places: Places | None = None,
    actor: type = PoolActor,
) -> dict[str, Pool]:
    """Start pools and build their workers, from the recipe or from a checkpoint folder.

    Raises:
        ResourceError: the cluster cannot hold them.
    """
    await_room(recipe)
    places = places or Places(recipe)
    pools = {name: _start(recipe, name, places, actor) for name in names}
    try:
        build_pools(recipe, pools, resume_from)
    except BaseException:
        for pool in pools.values():
            pool.stop()
        places.close()
        raise
    return pools


def build_pools(recipe: Recipe, pools: Mapping[str, Pool], resume_from: Path | None = None) -> None:
    """Build every worker, from the recipe or from a checkpoint folder, and let the ranks of a pool meet.

    Raises:
        ResourceError: not all of them were placed and ready in time.
    """
    until = time.monotonic() + START_TIMEOUT_S
    placed = {(name, rank): a.where.remote() for name, pool in pools.items() for rank, a in enumerate(pool.actors)}
    waiting = []
    for pool in pools.values():
        waiting += pool.all("load", resume_from) if resume_from else pool.all("build")
    homeless = not_placed(placed, TOLD_AFTER_S)
    if homeless:
        emit("waiting_for_room", ranks=homeless, free=spoken(ray.available_resources()), at_most_s=START_TIMEOUT_S)
    try:
        ray.get(waiting, timeout=max(0.0, until - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        homeless = not_placed(placed, 0.0)
        where = f"no room for {homeless}" if homeless else "all are placed, and not all are built"
        raise ResourceError(
            f"the pools did not start within {START_TIMEOUT_S} s ({where}): they ask for {spoken(asked(recipe))}, "
            f"and of the cluster {spoken(ray.available_resources())} is free; "
            "end what holds the rest, or lower pools.*.resources"
        ) from None
    join_groups(recipe, pools)


def not_placed(placed: Mapping[tuple[str, int], Any], patience_s: float) -> str:
    """Ranks that no node has taken yet, for people."""
    _, pending = wait_for(list(placed.values()), patience_s)
    return ", ".join(f"{name} rank {rank}" for (name, rank), ref in placed.items() if ref in pending)


def join_groups(recipe: Recipe, pools: Mapping[str, Pool]) -> None:
    """Give every pool of several ranks its process group, where sums are made by all-reduce."""
    if recipe.schedule.reduce != "fast":
        return
    waiting = []
    for name, pool in pools.items():
        if len(pool) > 1 and name != "speech":
            ray.get(pool.all("leave"))
            address = ray.get(pool.actors[0].group_address.remote())
            waiting += pool.all("join_group", address, recipe.schedule.timeout_s)
    ray.get(waiting)


def rank_of(recipe: Recipe, pool: str, rank: int) -> Rank:
    """Who an actor is in its pool, and where it computes."""
    config = pool_config(recipe, pool)
    return Rank(pool=pool, rank=rank, ranks=config.actors, device=device_name(config.resources))


def start_actor(recipe: Recipe, name: str, rank: int, places: Places, actor: type = PoolActor) -> Any:
    """Start one rank of a pool; its worker is not built yet."""
    # Threads are set by build(); an own runtime_env would cost a process start.
    options = places.options(name, rank)
    return ray.remote(actor).options(**options).remote(recipe, rank_of(recipe, name, rank))


def start_saving(recipe: Recipe, pool: Pool, folder: Path) -> list[Any]:
    """Let every rank of a pool write its part of a checkpoint; returns the handles of the beginnings."""
    if not is_sharded(pool_config(recipe, pool.name)):
        return pool.all("start_saving", folder)
    masters = pool.all("give_masters")
    first, *others = pool.actors
    return [first.save_shard.remote(folder, *masters), *(actor.save_shard.remote(folder) for actor in others)]


def wait_for(refs: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
    """(ended, still running) after at most ``seconds``; a call that failed has ended."""
    if not refs:
        return [], []
    until = time.monotonic() + seconds
    pending, ended = list(refs), []
    while pending:
        done, pending = ray.wait(
            pending, num_returns=len(pending), timeout=max(0.0, until - time.monotonic()), fetch_local=False
        )
        ended += done
        if time.monotonic() >= until:
            break
    return ended, pending


def _start(recipe: Recipe, name: str, places: Places, actor: type) -> Pool:
    ranks = range(pool_config(recipe, name).actors)
    return Pool(name=name, actors=tuple(start_actor(recipe, name, rank, places, actor) for rank in ranks))
