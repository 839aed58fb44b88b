"""The pools' actors as plain objects in one process: a step's calls in the order of the driver, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.language import StepContext
from actors.placement import POOL_NAMES, pool_config
from actors.pool_actor import PoolActor
from actors.transport import pack
from actors.worker import Rank
from omni_ray.bridge.route import RouteTable
from omni_ray.config.parallel import is_sharded, sends_terms_on
from omni_ray.config.recipe import Recipe
from omni_ray.training.networks import POOLS
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.modality import FEATURE_MODALITIES, Modality


class InProcessPools:
    """Real actors' classes and real workers; what travels between them is packed as on its way through the store."""

    def __init__(self, recipe: Recipe, device: str = "cpu", folder: Path | None = None) -> None:
        self.recipe = recipe
        self.pools: dict[str, list[PoolActor]] = {}
        for name in POOL_NAMES:
            ranks = pool_config(recipe, name).actors
            self.pools[name] = [
                PoolActor(recipe, Rank(pool=name, rank=r, ranks=ranks, device=device)) for r in range(ranks)
            ]
            self.all(name, *(("build",) if folder is None else ("load", folder)))
        self.live: dict[str, bool] = {}
        self.after_micro_batch: Callable[[int], None] | None = None
        """Called with its number when a micro-batch's work has ended in every pool."""

    def all(self, pool: str, method: str, *args: Any) -> list[Any]:
        """A worker method on every rank."""
        return [actor.invoke(method, *args) for actor in self.pools[pool]]

    def step(self, prepared: PreparedStep) -> tuple[float, bool]:
        """One training step; returns its norm and whether it was made."""
        plan, recipe = prepared.plan, self.recipe
        stage = recipe.stages.index(recipe.stage_at(plan.step)[0])
        live = self.live = {name: any(self.all(name, "set_stage", stage)) for name in POOL_NAMES}
        wanted = [modality for modality in FEATURE_MODALITIES if live[modality.value]]
        routes = RouteTable.of(plan)
        for name in filter(self.shared, POOLS):
            shards = self.all(name, "give_weights")
            for actor in self.pools[name]:
                actor.take_weights(*shards)
        for index in plan.order:
            sent = self._encode(prepared, routes, index)
            self._backward(index, self._language(prepared, index, sent, wanted), sent, wanted)
            for name in filter(self.sharded, POOLS):
                if sends_terms_on(pool_config(recipe, name)):
                    self._exchange(name, "add_pieces")
            if self.after_micro_batch is not None:
                self.after_micro_batch(index)
        training = [name for name in POOLS if live[name]]
        norms = [self._finish(name) for name in training]
        made = [actor.step(plan.step, *norms) for name in training for actor in self.pools[name]]
        statistics = self.all("language", "take_statistics")
        if live["language"]:
            for actor in self.pools["language"]:
                actor.balance(plan.step, made[0], *statistics)
        return made[0][0], all(stepped for _, stepped in made)

    def _encode(self, prepared: PreparedStep, routes: RouteTable, index: int) -> list[tuple[Modality, int, list[Any]]]:
        sent = []
        for modality in Modality:
            chunks = 1 if modality == Modality.SPEECH else self.recipe.schedule.num_chunks
            for rank in routes.ranks(index, modality):
                items = routes.select(index, modality, rank)
                media = {item.id: prepared.media[item.id] for item in items}
                pieces = self.pools[modality.value][rank].encode(index, items, chunks, None, media)
                sent.append((modality, rank, pieces if chunks > 1 else [pieces]))
        return sent

    def _language(self, prepared: PreparedStep, index: int, sent: list[Any], wanted: list[Modality]) -> list[Any]:
        items = tuple(item for item in prepared.plan.items if item.micro_batch == index)
        targets = frozenset(item.id for item in items) & prepared.targets
        context = StepContext(counts=prepared.plan.counts, items=items, targets=targets)
        payload = (pack(prepared.batches[index]), context)
        layout = [(modality, len(pieces)) for modality, _, pieces in sent]
        actor = self.pools["language"][prepared.plan.micro_batches[index].language_rank]
        out = actor.language(index, payload, layout, wanted, *(piece for _, _, pieces in sent for piece in pieces))
        return list(out[1:]) if out is not None else []

    def _backward(self, index: int, gradients: list[Any], sent: list[Any], wanted: list[Modality]) -> None:
        back = iter(gradients)
        for modality, rank, pieces in sent:
            if modality in wanted:
                self.pools[modality.value][rank].encoder_backward(index, *(next(back) for _ in pieces))

    def shared(self, name: str) -> bool:
        """Whether a pool's ranks own shares of its network."""
        return is_sharded(pool_config(self.recipe, name))

    def sharded(self, name: str) -> bool:
        """Whether they do and train in this stage."""
        return bool(self.live[name]) and self.shared(name)

    def _exchange(self, name: str, method: str) -> list[Any]:
        """Every rank's pieces to their owners' method."""
        pieces = [actor.give_pieces()[1:] for actor in self.pools[name]]
        return [getattr(actor, method)(*(row[r] for row in pieces)) for r, actor in enumerate(self.pools[name])]

    def _finish(self, name: str) -> float:
        actors = self.pools[name]
        if self.sharded(name):
            return float(actors[0].invoke("add_squares", *self._exchange(name, "finish_shard")))
        terms = self.all(name, "give_terms") if len(self.pools[name]) > 1 else []
        closed = [actor.finish(*terms) for actor in self.pools[name]]
        return closed[0]

    def save(self, folder: Path) -> None:
        """Write every pool's part of a checkpoint, and wait for it."""
        for name in POOL_NAMES:
            if self.shared(name):
                masters = self.all(name, "give_masters")
                for rank, actor in enumerate(self.pools[name]):
                    actor.save_shard(folder, *(masters if rank == 0 else ()))
            else:
                self.all(name, "start_saving", folder)
            assert set(self.all(name, "saving_status", True)) == {"done"}

    def weights(self, rank: int = 0) -> dict[str, Tensor]:
        """What is trained, by network and parameter or buffer, in host memory; of all ranks where they hold shares."""
        found: dict[str, Tensor] = {}
        for name in POOLS:
            actors = self.pools[name]
            chosen = actors if self.shared(name) else [actors[min(rank, len(actors) - 1)]]
            for actor in chosen:
                found |= {f"{name}/{key}": v.detach().cpu() for key, v in actor.worker.optimizer.weights().items()}
        return found


def reference_weights(reference: Any) -> dict[str, Tensor]:
    """The same of the single process."""
    return {f"{name}/{key}": value for name in POOLS for key, value in reference.optimizers[name].weights().items()}


def trained_alone(base: Path, recipe: Recipe) -> dict[str, Tensor]:
    """Weights after the single process has made all steps of the recipe on ``base/world``."""
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in range(recipe.total_steps):
        oracle.step(builder.build(step))
    return reference_weights(oracle)
