"""Supervision: pools that lose an actor are rebuilt and all pools rewind together.

The state after a step is kept three times: by every rank in its own process, and by an actor of another pool for the
pool's first rank (on another node where there is one); checkpoints on disk are the third.  When an actor dies, a warm
spare takes its rank, every pool goes back to the newest snapshot that all of them confirmed, and the steps since run
again from the recorded plans: the same calls in the same order, so the same bits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.placement import POOL_NAMES, Places, await_room, pool_config, spoken
from actors.pool import (
    START_TIMEOUT_S,
    TOLD_AFTER_S,
    build_pools,
    join_groups,
    not_placed,
    rank_of,
    start_actor,
    start_pools,
    wait_for,
)
from actors.pool_actor import PoolActor
from omni_ray.config.parallel import has_deepspeed, is_sharded
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import emit
from omni_ray.training.networks import POOLS
from omni_ray.types.errors import ResourceError

Named = tuple[str, int]
"""Pool and rank."""
SPARE_PATIENCE_S = 15.0
"""Longest wait for a spare that still imports torch, or that no node has room for."""


class Supervisor:
    """Owns the pools of a run, their snapshots and the spares.

    Args:
        recipe: The run.  resume_from: Checkpoint folder that the run began with, or None.
        actor: Class of the actors (a bench puts in one that can be told to die).
    """

    def __init__(self, recipe: Recipe, resume_from: Path | None = None, actor: type = PoolActor) -> None:
        self.recipe, self.resume_from, self._actor = recipe, resume_from, actor
        await_room(recipe)
        self.places = Places(recipe)
        try:
            self.pools = start_pools(recipe, POOL_NAMES, resume_from, self.places, actor)
        except BaseException:
            self.places.close()
            raise
        self.spares: dict[str, list[Any]] = {}
        self.confirmed = -1
        """Step of the newest snapshot that every pool has; -1 before the first."""
        self._pending: list[tuple[int, list[Any]]] = []
        self._holders: dict[Named, Named] = {}
        """Who keeps whose snapshot: one rank of a pool whose ranks are alike, every rank of a sharded one."""
        self._nodes: dict[Named, str] = {}

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self, step: int) -> None:
        """Submit copies of the state after ``step`` steps; they stand in the actors' queues behind those steps."""
        if not self._holders:
            self._choose_holders()
        waiting = [ref for name in POOLS for ref in self.pools[name].all("keep_snapshot", step)]
        given = {who: self._actor_of(who).invoke.remote("give_snapshot", step) for who in self._holders}
        for who, holder in self._holders.items():
            waiting.append(self._actor_of(holder).hold.remote(held_as(*who), step, given[who]))
        self._pending.append((step, waiting))

    def confirm(self, done: int) -> None:
        """Note which snapshots are whole; ``done`` steps have ended well."""
        while self._pending and self._pending[0][0] <= done:
            step, refs = self._pending[0]
            # They stand right behind the step's own calls, so this wait is short; without it the step's work could be
            # lost although the step has ended.
            ray.get(refs, timeout=self.recipe.schedule.timeout_s)
            self._pending.pop(0)
            self.confirmed = step
            for name in POOLS:
                self.pools[name].all("drop_snapshots", step)
            for holder in set(self._holders.values()):
                self._actor_of(holder).drop_held.remote(step)

    def _choose_holders(self) -> None:
        """Who keeps whose snapshot: an actor of another pool, on another node where there is one."""
        named = [(name, rank) for name in POOL_NAMES for rank in range(len(self.pools[name]))]
        places = ray.get([self.pools[name].actors[rank].where.remote() for name, rank in named])
        self._nodes = {who: node for who, (node, _, _) in zip(named, places, strict=True)}
        for place, name in enumerate(POOLS):
            order = POOLS[place + 1 :] + POOLS[:place]
            others = [(pool, rank) for pool in order for rank in range(len(self.pools[pool]))]
            for rank in range(len(self.pools[name]) if self._sharded(name) else 1):
                elsewhere = [who for who in others if self._nodes[who] != self._nodes[name, rank]]
                self._holders[name, rank] = (elsewhere or others)[0]

    def _actor_of(self, who: Named) -> Any:
        return self.pools[who[0]].actors[who[1]]

    def _sharded(self, name: str) -> bool:
        return is_sharded(pool_config(self.recipe, name))

    # --- spares ------------------------------------------------------------------------------------------------------

    def keep_spares(self) -> None:
        """Start the spares that are missing; returns at once."""
        for name in ("", *POOL_NAMES):
            wanted = pool_config(self.recipe, name).spares if name else self.recipe.pools.spares
            ready = self.spares.setdefault(name, [])
            while len(ready) < wanted:
                ready.append(self._start_spare(name))

    def _start_spare(self, name: str) -> Any:
        options = self.places.options(name, 0) if name else {"num_cpus": 0}
        options.pop("scheduling_strategy", None)
        spare: Any = ray.remote(self._actor).options(**options).remote()
        spare.warm.remote()
        return spare

    def _take_spare(self, name: str) -> Any | None:
        resources = pool_config(self.recipe, name).resources
        shared = [] if resources.gpu or resources.custom or self.recipe.placement == "colocate" else [""]
        for kind in (name, *shared):
            while self.spares.get(kind):
                spare = self.spares[kind].pop(0)
                if is_alive(spare, SPARE_PATIENCE_S):
                    return spare
                ray.kill(spare)
        return None

    # --- recovery ----------------------------------------------------------------------------------------------------

    def missing(self, suspects: Sequence[Named] = ()) -> list[Named]:
        """Ranks whose actor is gone; suspects, and whoever does not answer within the time-out, are ended first."""
        for name, rank in suspects:
            ray.kill(self.pools[name].actors[rank])
        named = [(name, rank) for name, pool in self.pools.items() for rank in range(len(pool))]
        refs = [self.pools[name].actors[rank].where.remote() for name, rank in named]
        _, silent = wait_for(refs, self.recipe.schedule.timeout_s)
        gone = []
        for who, ref in zip(named, refs, strict=True):
            if ref in silent:
                ray.kill(self.pools[who[0]].actors[who[1]])
                gone.append(who)
            elif not _ended_well(ref):
                gone.append(who)
        return gone

    def recover(self, gone: Sequence[Named], fallback: tuple[int, Path | None], ended: int) -> int:
        """Replace the ranks that are gone and rewind every pool.

        Args:
            gone: Output of :meth:`missing`.  fallback: Step and folder to go back to (None: the recipe's start) if
                the snapshots are lost, too.  ended: Steps that had ended.
        Returns:
            The number of steps whose state every pool now has.
        """
        started = time.monotonic()
        gone = self._with_engine_peers(gone)
        sources = {who: self._source(*who, gone) for who in gone if who[0] in POOLS}
        self._pending.clear()
        for name, rank in gone:
            self._replace(name, rank)
        if self.confirmed >= 0 and all(source is not None for source in sources.values()):
            step = self.confirmed
            self._rewind(step, gone, sources)
            join_groups(self.recipe, self.pools)
        else:
            step, folder = fallback
            self.confirmed = -1
            build_pools(self.recipe, self.pools, folder)
        self._holders = {}
        names = ", ".join(f"{name} rank {rank}" for name, rank in gone) or "the feeder"
        seconds = time.monotonic() - started
        emit("recovered", lost=names, step=step, lost_steps=ended - step, seconds=seconds)
        return step

    def _with_engine_peers(self, gone: Sequence[Named]) -> list[Named]:
        """Whoever is gone, and all language ranks under DeepSpeed: its engine does not change process groups."""
        peers = [("language", rank) for rank in range(len(self.pools["language"]))]
        return [*gone, *(who for who in peers if has_deepspeed(self.recipe.pools.language) and who not in gone)]

    def _source(self, name: str, lost: int, gone: Sequence[Named]) -> Named | None:
        """Who can give a lost rank's snapshot: another rank of its pool, where all are alike, else its holder."""
        own = [(name, rank) for rank in range(len(self.pools[name])) if (name, rank) not in gone]
        own = [] if self._sharded(name) else own
        holder = self._holders.get((name, lost if self._sharded(name) else 0))
        return own[0] if own else holder if holder is not None and holder not in gone else None

    def _replace(self, name: str, rank: int) -> None:
        ray.kill(self.pools[name].actors[rank])  # gone already, or cut off: it must not come back
        spare = self._take_spare(name)
        if spare is None:
            fresh = start_actor(self.recipe, name, rank, self.places, self._actor)
        else:
            spare.adopt.remote(self.recipe, rank_of(self.recipe, name, rank))
            fresh = spare
        actors = list(self.pools[name].actors)
        actors[rank] = fresh
        self.pools[name] = dataclasses.replace(self.pools[name], actors=tuple(actors))

    def _rewind(self, step: int, gone: Sequence[Named], sources: dict[Named, Named | None]) -> None:
        waiting: list[Any] = []
        placed = {(name, rank): self.pools[name].actors[rank].where.remote() for name, rank in gone}
        for name, rank in gone:
            actor = self.pools[name].actors[rank]
            if name not in POOLS:
                waiting.append(actor.invoke.remote(*(("load", self.resume_from) if self.resume_from else ("build",))))
                continue
            source = sources[name, rank]
            assert source is not None
            giver, own = self._actor_of(source), source[0] == name
            held = held_as(name, rank if self._sharded(name) else 0)
            state = giver.invoke.remote("give_snapshot", step) if own else giver.held.remote(held, step)
            actor.invoke.remote("build")
            waiting.append(actor.invoke.remote("take_snapshot", step, state))
        for name in POOLS:
            for rank in range(len(self.pools[name])):
                if (name, rank) not in gone:
                    waiting.append(self.pools[name].actors[rank].invoke.remote("rewind", step))
        homeless = not_placed(placed, TOLD_AFTER_S)
        if homeless:
            emit("waiting_for_room", ranks=homeless, free=spoken(ray.available_resources()), at_most_s=START_TIMEOUT_S)
        try:
            ray.get(waiting, timeout=START_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            raise ResourceError(
                f"lost actors ({', '.join(f'{n} rank {r}' for n, r in gone)}) could not be replaced within "
                f"{START_TIMEOUT_S} s; of the cluster {spoken(ray.available_resources())} is free"
            ) from None

    def close(self) -> None:
        """End every actor."""
        for pool in self.pools.values():
            pool.stop()
        for ready in self.spares.values():
            for spare in ready:
                ray.kill(spare)
        self.places.close()


def held_as(pool: str, rank: int) -> str:
    """Name of a rank's snapshot with its holder."""
    return f"{pool}-{rank}"


def is_alive(actor: Any, patience_s: float, method: str = "where", *args: Any) -> bool:
    """Whether an actor answers a call within ``patience_s``."""
    ref = getattr(actor, method).remote(*args)
    ended, _ = wait_for([ref], patience_s)
    return bool(ended) and _ended_well(ref)


def _ended_well(ref: Any) -> bool:
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return False
    return True
