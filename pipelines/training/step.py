"""One training step over the pools: submit every call as a handle, wait once.

The driver moves handles only.  What runs when is the order of submission (omni_ray/schedule): every actor runs its
calls first in, first out; a step may be submitted while the one before it still runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.feeder import PayloadKey
from actors.placement import pool_config
from actors.pool import Pool
from omni_ray.bridge.route import RouteTable
from omni_ray.config.parallel import has_deepspeed, is_sharded, sends_terms_on
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import emit
from omni_ray.observability.spans import span
from omni_ray.schedule.order import Kind, call_order
from omni_ray.training.loss import means
from omni_ray.training.networks import POOLS
from omni_ray.types.batch import StepPlan
from omni_ray.types.modality import FEATURE_MODALITIES, Modality
from pipelines.training.waiting import Submitted, bounded_get, bounded_get_ready

Sent = tuple[Modality, int, list[Any]]
"""What an encoder rank sends or gets back: its modality, its rank, the pieces."""
Pieces = list[tuple[Any, list[Any]]]
"""Terms of some ranks of a sharded pool: for each a token, and one handle for every owner."""


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
    bytes_by_hop: dict[str, int]
    """Bytes of features and gradients that crossed the bridge, by ``from>to``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHandles:
    """A submitted step."""

    plan: StepPlan
    """Its plan."""
    statistics: list[Any]
    """One handle a language rank: (sums, expert counts)."""
    steps: list[Any]
    """One handle an actor: (norm, made)."""
    calls: list[Submitted]
    """Everything submitted, in order; all of it must end well."""
    live: Mapping[str, bool]
    """Which pools train."""


@dataclass(slots=True)
class _Step:
    """A step while it is submitted."""

    plan: StepPlan
    routes: RouteTable
    payloads: dict[PayloadKey, Any] = field(default_factory=dict)
    features: dict[int, list[Sent]] = field(default_factory=dict)
    gradients: dict[int, list[Sent]] = field(default_factory=dict)
    tokens: list[Any] = field(default_factory=list)
    """Language calls' tokens, in order: the credits of frozen encoders."""
    encoded: int = 0
    """Micro-batches whose encoding was submitted."""
    calls: list[Submitted] = field(default_factory=list)
    sent_on: dict[str, deque[Pieces]] = field(default_factory=dict)
    """Gradient terms of sharded pools on their way to their owners."""


class StepDriver:
    """Submits steps to the pools of one run."""

    def __init__(self, recipe: Recipe, pools: Mapping[str, Pool], feeder: Any) -> None:
        self.recipe = recipe
        self.pools = pools
        self.feeder = feeder
        self.live: dict[str, bool] = {}
        self.shards: dict[str, list[Any]] = {}
        """Weights of every rank of the sharded pools, on their way to the other ranks."""
        self.probe: Callable[[int], None] | None = None
        """Called with the step's number when its gradient is closed and not yet applied: a place to look at it."""

    @property
    def window(self) -> int:
        """Micro-batches that encoders run ahead: the recipe's window for every language rank."""
        return self.recipe.schedule.window * len(self.pools["language"])

    def enter_stage(self, index: int) -> None:
        """Tell every pool which stage runs; waits, since later submissions depend on who trains."""
        handles = {name: pool.all("set_stage", index) for name, pool in self.pools.items()}
        self.live = {name: any(ray.get(refs)) for name, refs in handles.items()}
        # Those that do not train now, too: a stage before may have let go of weights.
        shared = [name for name in POOLS if name in self.pools and is_sharded(pool_config(self.recipe, name))]
        self.shards = {name: self.pools[name].all("give_weights") for name in shared}
        under_deepspeed = ["language"] if self._under_deepspeed() and self.live["language"] else []
        for name in [*filter(self._sharded, shared), *under_deepspeed]:
            rest, state, whole = zip(*ray.get(self.pools[name].all("bytes_at_rest")), strict=True)
            facts = {"rank_bytes": list(rest), "rank_state_bytes": list(state), "whole_bytes": whole[0]}
            emit("sharded", pool=name, shard=pool_config(self.recipe, name).shard, **facts)
        for name in POOLS:
            if name in self.pools and self.live[name] and pool_config(self.recipe, name).offload == "cpu":
                self._tell_offload(name)

    def _tell_offload(self, name: str) -> None:
        """Say what lies in host memory, or that it would lie there anyway."""
        found = ray.get(self.pools[name].all("state_in_host"))
        if any(held for _, held in found):
            emit("offloaded", pool=name, device=found[0][0], host_bytes=[held for _, held in found])
        else:
            why = "the pool computes on the CPU, where masters and moments lie in host memory anyway"
            emit("offload_idle", pool=name, reason=why)

    def _under_deepspeed(self) -> bool:
        return has_deepspeed(self.recipe.pools.language)

    def _sharded(self, name: str) -> bool:
        return self.live[name] and is_sharded(pool_config(self.recipe, name))

    def submit(self, plan: StepPlan, asked: Callable[[], None] | None = None) -> StepHandles:
        """Submit a whole step.

        Args:
            plan: Of the step.
            asked: Called when the feeder has been asked for the step's parts, which it gives in the order asked: a
                plan that is asked for here cannot hold them up.
        """
        with span("submit", step=plan.step):
            step = _Step(plan=plan, routes=RouteTable.of(plan))
            self._ask_payloads(step)
            if asked is not None:
                asked()
            step.calls += self.gather()
            for call in call_order(self.recipe.schedule.kind, plan.order, self.window):
                if call.kind == Kind.ENCODE:
                    self._encode(step, call.micro_batch)
                elif call.kind == Kind.LANGUAGE:
                    self._language(step, call.micro_batch)
                elif call.kind == Kind.ENCODER_BACKWARD:
                    self._backward(step, call.micro_batch)
                else:
                    self._barrier(step)
            return self._close(step)

    def collect(self, handles: StepHandles) -> StepResult:
        """Wait for a step and read its figures.

        Raises:
            StuckError: no call ended for ``schedule.timeout_s``.
        """
        with span("collect", step=handles.plan.step):
            ends = [call.refs[0] for call in handles.calls if call.phase in ("encoder_backward", "language", "balance")]
            limit, step = self.recipe.schedule.timeout_s, handles.plan.step
            wanted = [*handles.statistics, *handles.steps, *ends]
            values = bounded_get(wanted, handles.calls, limit, step)
        statistics = values[: len(handles.statistics)]
        norms = values[len(statistics) : len(statistics) + len(handles.steps)]
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
            bytes_by_hop=bytes_by_hop(handles.plan, handles.live, self.recipe),
        )

    def _ask_payloads(self, step: _Step) -> None:
        keys: list[PayloadKey] = []
        for batch in step.plan.micro_batches:
            keys.append(("rows", batch.index, 0))
            for modality in Modality:
                keys += [(modality.value, batch.index, rank) for rank in step.routes.ranks(batch.index, modality)]
        refs = self.feeder.payloads.options(num_returns=len(keys)).remote(step.plan.step, keys)
        refs = refs if len(keys) > 1 else [refs]
        step.payloads = dict(zip(keys, refs, strict=True))
        step.calls.append(Submitted("feeder", 0, "payloads", -1, tuple(refs)))

    def gather(self) -> list[Submitted]:
        """Ranks of sharded pools take in each other's weights, if they have not; returns the calls."""
        calls = []
        for name, shards in self.shards.items():
            for rank, actor in enumerate(self.pools[name].actors):
                taken = actor.take_weights.remote(*shards)
                calls.append(Submitted(name, rank, "take_weights", -1, (taken,), tuple(shards)))
        self.shards = {}
        if self._under_deepspeed() and self.recipe.pools.language.shard == "zero3":
            for rank, ref in enumerate(self.pools["language"].all("gather_weights")):
                calls.append(Submitted("language", rank, "gather_weights", -1, (ref,)))
        return calls

    def _encode(self, step: _Step, index: int) -> None:
        step.features[index] = []
        behind = step.encoded - self.window
        step.encoded += 1
        for modality in Modality:
            # An encoder that trains is held back by its own backward calls; a frozen one needs a credit.
            pipelined = self.recipe.schedule.kind == "pipelined"
            credit = step.tokens[behind] if pipelined and behind >= 0 and not self.live[modality.value] else None
            for rank in step.routes.ranks(index, modality):
                chunks = 1 if modality == Modality.SPEECH else self.recipe.schedule.num_chunks
                actor = self.pools[modality.value].actors[rank]
                payload = step.payloads[modality.value, index, rank]
                items = step.routes.select(index, modality, rank)
                refs = actor.encode.options(num_returns=chunks).remote(index, items, chunks, credit, payload)
                refs = refs if chunks > 1 else [refs]
                step.features[index].append((modality, rank, refs))
                needs = (payload,) if credit is None else (payload, credit)
                step.calls.append(Submitted(modality.value, rank, "encode", index, tuple(refs), needs))

    def _language(self, step: _Step, index: int) -> None:
        sent = step.features.pop(index)
        wanted = [m for m in FEATURE_MODALITIES if self.live[m.value]]
        chunks = self.recipe.schedule.num_chunks
        back = [(modality, rank) for modality, rank, _ in sent if modality in wanted]
        rank = step.plan.micro_batches[index].language_rank
        pieces = [ref for _, _, refs in sent for ref in refs]
        payload = step.payloads["rows", index, 0]
        layout = [(modality, len(refs)) for modality, _, refs in sent]
        actor = self.pools["language"].actors[rank]
        returns = 1 + len(back) * chunks
        out = actor.language.options(num_returns=returns).remote(index, payload, layout, wanted, *pieces)
        token, *refs = out if returns > 1 else [out]
        step.tokens.append(token)
        step.gradients[index] = [(m, r, refs[k * chunks : (k + 1) * chunks]) for k, (m, r) in enumerate(back)]
        step.calls.append(Submitted("language", rank, "language", index, (token, *refs), (payload, *pieces)))
        # A round behind: an owner adds what the others made while it worked, and waits for nobody.
        self._send_on(step, "language", [rank], index, behind=len(self.pools["language"]))

    def _backward(self, step: _Step, index: int) -> None:
        ranks: dict[str, list[int]] = {}
        for modality, rank, refs in step.gradients.pop(index):
            done = self.pools[modality.value].actors[rank].encoder_backward.remote(index, *refs)
            step.calls.append(Submitted(modality.value, rank, "encoder_backward", index, (done,), tuple(refs)))
            ranks.setdefault(modality.value, []).append(rank)
        for name, made in ranks.items():
            self._send_on(step, name, made, index, behind=1)

    def _send_on(self, step: _Step, name: str, ranks: Sequence[int], index: int, behind: int) -> None:
        """Let ranks give the terms of a micro-batch to their owners, who add them ``behind`` micro-batches later."""
        if not (self._sharded(name) and sends_terms_on(pool_config(self.recipe, name))):
            return
        waiting = step.sent_on.setdefault(name, deque())
        waiting.append(self._give_pieces(step, name, ranks, index))
        while len(waiting) > behind:
            self._add_pieces(step, name, waiting.popleft())

    def _give_pieces(self, step: _Step, name: str, ranks: Sequence[int], index: int = -1) -> Pieces:
        given: Pieces = []
        for rank in ranks:
            actor = self.pools[name].actors[rank]
            token, *refs = actor.give_pieces.options(num_returns=1 + len(self.pools[name])).remote()
            # The step remembers the token alone: pieces leave the store when their owners have them.
            step.calls.append(Submitted(name, rank, "give_pieces", index, (token,)))
            given.append((token, refs))
        return given

    def _add_pieces(self, step: _Step, name: str, given: Pieces) -> None:
        tokens = tuple(token for token, _ in given)
        for rank, actor in enumerate(self.pools[name].actors):
            added = actor.add_pieces.remote(*(refs[rank] for _, refs in given))
            step.calls.append(Submitted(name, rank, "add_pieces", -1, (added,), tokens))

    def _barrier(self, step: _Step) -> None:
        last = [call.refs[0] for call in step.calls if call.phase != "payloads"]
        bounded_get_ready(last, step.calls, self.recipe.schedule.timeout_s, step.plan.step)

    def _close(self, step: _Step) -> StepHandles:
        """Gradient sums, one global norm, optimizer steps in every pool at once."""
        norms = []
        training = [name for name in POOLS if name in self.pools and self.live[name]]
        for name in training:
            if self._sharded(name):
                norms.append(self._finish_sharded(step, name))
                continue
            pool = self.pools[name]
            exchange = len(pool) > 1 and self.recipe.schedule.reduce == "ordered"
            terms = pool.all("give_terms") if exchange else []
            for rank, ref in enumerate(terms):
                step.calls.append(Submitted(name, rank, "give_terms", -1, (ref,)))
            finished = [actor.finish.remote(*terms) for actor in pool.actors]
            for rank, ref in enumerate(finished):
                step.calls.append(Submitted(name, rank, "finish", -1, (ref,), tuple(terms)))
            norms.append(finished[0])
        if self.probe is not None:
            self.probe(step.plan.step)
        steps = []
        for name in training:
            for rank, actor in enumerate(self.pools[name].actors):
                made = actor.step.remote(step.plan.step, *norms)
                steps.append(made)
                step.calls.append(Submitted(name, rank, "step", -1, (made,), tuple(norms)))
            if self._sharded(name):
                self.shards[name] = self.pools[name].all("give_weights")
        language = self.pools["language"]
        statistics = language.all("take_statistics")
        for rank, ref in enumerate(statistics):
            step.calls.append(Submitted("language", rank, "take_statistics", -1, (ref,)))
        if self.live["language"]:
            for rank, actor in enumerate(language.actors):
                moved = actor.balance.remote(step.plan.step, steps[0], *statistics)
                step.calls.append(Submitted("language", rank, "balance", -1, (moved,), (steps[0], *statistics)))
        return StepHandles(plan=step.plan, statistics=statistics, steps=steps, calls=step.calls, live=dict(self.live))

    def _finish_sharded(self, step: _Step, name: str) -> Any:
        """Every rank closes the gradient of what it owns; returns the handle of the pool's squared norm."""
        actors = self.pools[name].actors
        for given in step.sent_on.pop(name, ()):
            self._add_pieces(step, name, given)
        late = not sends_terms_on(pool_config(self.recipe, name))
        pieces = self._give_pieces(step, name, range(len(actors))) if late else []
        tokens = tuple(token for token, _ in pieces)
        finished = []
        for rank, actor in enumerate(actors):
            finished.append(actor.finish_shard.remote(*(refs[rank] for _, refs in pieces)))
            step.calls.append(Submitted(name, rank, "finish", -1, (finished[-1],), tokens))
        norm = actors[0].invoke.remote("add_squares", *finished)
        step.calls.append(Submitted(name, 0, "add_squares", -1, (norm,), tuple(finished)))
        return norm


def bytes_by_hop(plan: StepPlan, live: Mapping[str, bool], recipe: Recipe) -> dict[str, int]:
    """Payload of the bridge in a step: features to the language pool, gradients back to pools that train.

    Both have the precision of the encoder that makes the features.
    """
    hops: dict[str, int] = {}
    for modality in FEATURE_MODALITIES:
        rows = sum(item.length for item in plan.items if item.modality == modality)
        if rows:
            width = 4 if pool_config(recipe, modality.value).precision == "fp32" else 2
            hops[f"{modality.value}>language"] = rows * recipe.networks.language.hidden_size * width
            if live[modality.value]:
                hops[f"language>{modality.value}"] = hops[f"{modality.value}>language"]
    return hops
