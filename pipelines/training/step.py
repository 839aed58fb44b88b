"""One training step over the pools: submit every call as a handle, wait once.

The driver moves handles only.  What runs when is the order of submission (omni_ray/schedule): every actor runs its
calls first in, first out; a step may be submitted while the one before it still runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from actors.feeder import PayloadKey
from actors.pool import Pool
from omni_ray.bridge.route import RouteTable
from omni_ray.config.recipe import Recipe
from omni_ray.schedule.order import Kind, call_order
from omni_ray.training.loss import means
from omni_ray.training.networks import POOLS
from omni_ray.types.batch import StepPlan
from omni_ray.types.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a finished step reports."""

    step: int
    """Global step."""
    stage: str
    """Stage name."""
    losses: dict[str, float]
    """Mean cross-entropy by term."""
    norm: float
    """Global gradient norm before clipping."""
    stepped: bool
    """False when the norm was not finite and every pool skipped."""
    rows: int
    """Packed rows of the step."""
    experts_per_token: float
    """Mean number of FFN experts a token used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHandles:
    """A submitted step."""

    plan: StepPlan
    """Its plan."""
    statistics: list[Any]
    """One handle a language rank: (sums, expert counts)."""
    steps: list[Any]
    """One handle an actor: (norm, made)."""
    rest: list[Any]
    """Handles that only need to end well."""


class StepDriver:
    """Submits steps to the pools of one run."""

    def __init__(self, recipe: Recipe, pools: Mapping[str, Pool], feeder: Any) -> None:
        self.recipe = recipe
        self.pools = pools
        self.feeder = feeder
        self.live: dict[str, bool] = {}

    def enter_stage(self, index: int) -> None:
        """Tell every pool which stage runs; waits, since later submissions depend on who trains."""
        handles = {name: pool.all("set_stage", index) for name, pool in self.pools.items()}
        self.live = {name: any(ray.get(refs)) for name, refs in handles.items()}

    def submit(self, plan: StepPlan) -> StepHandles:
        """Submit a whole step."""
        routes = RouteTable.of(plan)
        payloads = self._payloads(plan, routes)
        features: dict[int, list[tuple[Modality, int, list[Any]]]] = {}
        gradients: dict[int, list[tuple[Modality, int, list[Any]]]] = {}
        rest: list[Any] = []
        schedule = self.recipe.schedule
        for call in call_order(schedule.kind, plan.order, schedule.window):
            index = call.micro_batch
            if call.kind == Kind.ENCODE:
                features[index] = self._encode(index, routes, payloads)
            elif call.kind == Kind.LANGUAGE:
                gradients[index] = self._language(plan, index, features.pop(index), payloads)
            elif call.kind == Kind.ENCODER_BACKWARD:
                rest += self._backward(index, gradients.pop(index))
            else:
                waiting = [
                    ref for sent in (*features.values(), *gradients.values()) for _, _, refs in sent for ref in refs
                ]
                ray.wait(waiting + rest, num_returns=len(waiting + rest), fetch_local=False) if waiting + rest else None
        return self._close(plan, rest)

    def collect(self, handles: StepHandles) -> StepResult:
        """Wait for a step and read its figures."""
        ray.get(handles.rest)
        statistics = ray.get(handles.statistics)
        norms = ray.get(handles.steps)
        sums = sum(part[0] for part in statistics)
        experts = sum(part[1] for part in statistics)
        language = self.recipe.networks.language
        assigned = max(1, int(experts.sum()))
        return StepResult(
            step=handles.plan.step,
            stage=handles.plan.stage,
            losses=means(sums, handles.plan.counts),
            norm=norms[0][0],
            stepped=all(made for _, made in norms),
            rows=handles.plan.counts["rows"],
            experts_per_token=float(experts[:, : language.n_routed_experts].sum()) / assigned * language.moe_topk,
        )

    def _payloads(self, plan: StepPlan, routes: RouteTable) -> dict[PayloadKey, Any]:
        keys: list[PayloadKey] = []
        for batch in plan.micro_batches:
            keys.append(("rows", batch.index, 0))
            for modality in Modality:
                keys += [(modality.value, batch.index, rank) for rank in routes.ranks(batch.index, modality)]
        refs = self.feeder.payloads.options(num_returns=len(keys)).remote(plan.step, keys)
        return dict(zip(keys, refs if len(keys) > 1 else [refs], strict=True))

    def _encode(
        self, index: int, routes: RouteTable, payloads: Mapping[PayloadKey, Any]
    ) -> list[tuple[Modality, int, list[Any]]]:
        sent = []
        for modality in Modality:
            for rank in routes.ranks(index, modality):
                chunks = 1 if modality == Modality.SPEECH else self.recipe.schedule.num_chunks
                refs = (
                    self.pools[modality.value]
                    .actors[rank]
                    .encode.options(num_returns=chunks)
                    .remote(index, routes.select(index, modality, rank), chunks, payloads[modality.value, index, rank])
                )
                sent.append((modality, rank, refs if chunks > 1 else [refs]))
        return sent

    def _language(
        self,
        plan: StepPlan,
        index: int,
        sent: list[tuple[Modality, int, list[Any]]],
        payloads: Mapping[PayloadKey, Any],
    ) -> list[tuple[Modality, int, list[Any]]]:
        wanted = [m for m in (Modality.VISION, Modality.AUDIO) if self.live[m.value]]
        chunks = self.recipe.schedule.num_chunks
        back = [(modality, rank) for modality, rank, _ in sent if modality in wanted]
        returns = max(1, len(back) * chunks)
        actor = self.pools["language"].actors[plan.micro_batches[index].language_rank]
        refs = actor.language.options(num_returns=returns).remote(
            index,
            payloads["rows", index, 0],
            [(modality, len(pieces)) for modality, _, pieces in sent],
            wanted,
            *[ref for _, _, pieces in sent for ref in pieces],
        )
        refs = refs if returns > 1 else [refs]
        gradients = [(m, rank, refs[k * chunks : (k + 1) * chunks]) for k, (m, rank) in enumerate(back)]
        # A micro-batch without trainable media still has a handle to wait for.
        return gradients or [(Modality.SPEECH, -1, refs)]

    def _backward(self, index: int, gradients: list[tuple[Modality, int, list[Any]]]) -> list[Any]:
        rest: list[Any] = []
        for modality, rank, refs in gradients:
            if rank < 0:
                rest += refs
            else:
                rest.append(self.pools[modality.value].actors[rank].encoder_backward.remote(index, *refs))
        return rest

    def _close(self, plan: StepPlan, rest: list[Any]) -> StepHandles:
        """Gradient sums, one global norm, optimizer steps in every pool at once."""
        norms = []
        for name in POOLS:
            pool = self.pools.get(name)
            if pool is not None and self.live[name]:
                terms = pool.all("give_terms") if len(pool) > 1 else []
                finished = [actor.finish.remote(*terms) for actor in pool.actors]
                norms.append(finished)
        gathered = [ranks[0] for ranks in norms]
        steps = []
        for name in POOLS:
            if name in self.pools and self.live[name]:
                steps += [actor.step.remote(plan.step, *gathered) for actor in self.pools[name].actors]
        language = self.pools["language"]
        statistics = language.all("take_statistics")
        if self.live["language"]:
            rest = rest + [actor.balance.remote(plan.step, *statistics) for actor in language.actors]
        return StepHandles(plan=plan, statistics=statistics, steps=steps, rest=rest)
