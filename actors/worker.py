"""What every worker shares: a network, an optimizer, a stage; plain classes without Ray.

A training actor, a Serve replica and a plain process hold the same workers.  A worker receives its calls in submission
order; sums of gradient terms are made in that order, or, over several ranks, in the order of the terms' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.group import PoolGroup, group_backend, leave_group
from actors.snapshot import BackgroundSave, Snapshots, WorkerState, load_optimizer, write_shard
from omni_ray.bridge.chunk import join, split
from omni_ray.bridge.route import tiles_of
from omni_ray.config.parallel import PoolConfig, is_sharded, shares_weights
from omni_ray.config.recipe import Recipe
from omni_ray.training.deepspeed_optimizer import DeepSpeedOptimizer
from omni_ray.training.digest import digests
from omni_ray.training.memory import keep_freed_memory
from omni_ray.training.networks import build_network
from omni_ray.training.optimizer import PoolOptimizer, rates
from omni_ray.training.precision import host_copy
from omni_ray.training.process import settle_process
from omni_ray.training.sharding import MASTER_BYTES, MOMENT_BYTES, ShardedOptimizer, add_up
from omni_ray.types.batch import EmbeddingBatch, ItemRoute
from omni_ray.types.errors import ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Who a worker is inside its pool."""

    pool: str
    """vision, audio, speech or language."""
    rank: int = 0
    """Number inside the pool."""
    ranks: int = 1
    """Size of the pool."""
    device: str = "cpu"
    """Where it computes: ``cpu``, or ``cuda`` for the GPU that Ray lent it."""


def check_device(rank: Rank) -> None:
    """Refuse a GPU that is not there.

    Raises:
        ResourceError: names pool and rank, and the mend.
    """
    if rank.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            f"pool {rank.pool}, rank {rank.rank} asks for a GPU; this node has none that torch {torch.__version__} can "
            f"use: set pools.{rank.pool}.resources.gpu to 0, or install driver (nvidia-smi shows it) and a CUDA torch"
        )


class NetworkWorker:
    """Owns one network and its optimizer state."""

    network_name = ""

    def __init__(self, recipe: Recipe, rank: Rank) -> None:
        self.recipe = recipe
        self.rank = rank
        self.device = torch.device(rank.device)
        """Where network, inputs, sums and loaded state lie; what leaves the worker travels through host memory."""
        self.live = False
        """Whether the stage trains any part of this network."""
        self.terms: dict[int, Tensor] = {}
        """Gradient terms by number; kept only when several ranks must add them in one order."""
        self.pieces: dict[int, list[Tensor]] = {}
        """The same in a sharded pool: every term is cut by who owns the parameters."""
        self.group: PoolGroup | None = None
        """The pool's process group, where sums are made by all-reduce."""
        self.saving = BackgroundSave()
        self.snapshots = Snapshots()
        """States of this worker in memory, by step."""

    def build(self, folder: Path | None = None) -> None:
        """Make the network, from ``folder`` (``model/NAME`` of a checkpoint) or as the recipe starts.

        Raises:
            ResourceError: the worker should compute on a GPU and this node has none.
        """
        check_device(self.rank)
        settle_process(threads=self.pool.threads, deterministic=self.recipe.deterministic)
        network = build_network(self.network_name, self.recipe, folder)
        # Dropout and masks belong to component pretraining; here a tile's bits must repeat.
        self.network: nn.Module = network.to(self.device).eval()
        self.optimizer: PoolOptimizer
        pool, rank = self.pool, self.rank
        parts = (rank.pool, self.network, self.recipe.optimizer, pool.precision, pool.offload == "cpu")
        if rank.pool == "language" and self.recipe.pools.language.backend == "deepspeed":
            self.optimizer = DeepSpeedOptimizer(*parts[:3], int(pool.shard[-1]))
        elif is_sharded(pool):
            self.optimizer = ShardedOptimizer(*parts, rank.rank, rank.ranks, not shares_weights(pool))
        else:
            self.optimizer = PoolOptimizer(*parts)
        self.stage = self.recipe.stages[0] if self.recipe.stages else None

    @property
    def pool(self) -> PoolConfig:
        """This pool's section of the recipe."""
        config: PoolConfig = getattr(self.recipe.pools, self.rank.pool)
        return config

    def set_stage(self, index: int) -> bool:
        """Enter a curriculum stage; returns whether this network trains in it."""
        if self.pool.keep_freed_memory:
            keep_freed_memory()
        self.stage = self.recipe.stages[index]
        self.live = self.optimizer.set_stage(self.stage)
        return self.live

    def join_group(self, address: str, timeout_s: float) -> None:
        """Meet the other ranks of the pool, for ``reduce: fast``."""
        backend = group_backend(self.device, self.pool.resources.gpu)
        self.group = PoolGroup(self.rank.pool, self.rank.rank, self.rank.ranks, address, timeout_s, backend)
        self.optimizer.group = self.group

    def leave(self) -> None:
        """Give the process group back."""
        self.group = None
        leave_group()

    @property
    def ordered(self) -> bool:
        """Whether sums are made term by term in one order, whatever the pool sizes."""
        return self.recipe.schedule.reduce == "ordered"

    def keep_term(self, number: int) -> None:
        """Close one gradient term; on a single rank it is added to those before it."""
        if self.live and is_sharded(self.pool):
            self.pieces[number] = self.shard.take_pieces()
        elif self.live and self.rank.ranks > 1 and self.ordered:
            self.terms[number] = self.optimizer.take_term()
        elif self.live:
            self.optimizer.close_term()

    def give_terms(self) -> tuple[list[int], Tensor]:
        """This rank's gradient terms for the others: their numbers, and rows [terms, parameters]."""
        numbers = sorted(self.terms)
        return numbers, torch.stack([self.terms[n] for n in numbers]) if numbers else torch.zeros(0, 0)

    def finish(self, others: Sequence[tuple[Sequence[int], Tensor]]) -> float:
        """Close the step's gradient and return its squared norm.

        Args:
            others: :meth:`give_terms` of every rank of the pool (this one too); empty on a single rank.
        """
        if not self.live:
            return 0.0
        if self.rank.ranks > 1 and not self.ordered:
            assert self.group is not None, "reduce: fast over several ranks needs join_group first"
            self.optimizer.reduce(self.group)
        elif self.rank.ranks > 1:
            rows = {n: row for numbers, rows in others for n, row in zip(numbers, rows, strict=True)}
            self.optimizer.clear()
            self.optimizer.put_terms(rows[n] for n in sorted(rows))
            self.terms = {}
        return self.optimizer.norm_squared()

    # --- a sharded pool ----------------------------------------------------------------------------------------------

    def give_pieces(self) -> list[tuple[list[int], list[Tensor]]]:
        """Gradient terms made since the last call, for every rank: their numbers, and its flat pieces of them."""
        made, self.pieces = self.pieces, {}
        numbers = sorted(made)
        return [(numbers, [made[n][rank] for n in numbers]) for rank in range(self.rank.ranks)]

    def add_pieces(self, others: Sequence[tuple[Sequence[int], Sequence[Tensor]]]) -> None:
        """Add terms to the gradient of what this rank owns; ``others``: its pair of ranks' :meth:`give_pieces`."""
        named = [pair for numbers, pieces in others for pair in zip(numbers, pieces, strict=True)]
        self.shard.add_pieces(dict(named))

    def finish_shard(self, others: Sequence[tuple[Sequence[int], Sequence[Tensor]]]) -> list[tuple[int, float]]:
        """Close the gradient of what this rank owns and let go of weights that are not kept.

        Args:
            others: As in :meth:`add_pieces`; empty where all terms were sent on before.
        Returns:
            Output of :meth:`ShardedOptimizer.squares`.
        """
        self.add_pieces(others)
        squares = self.shard.squares()
        self.shard.release()
        return squares

    def add_squares(self, *parts: Sequence[tuple[int, float]]) -> float:
        """The pool's squared norm; see :func:`omni_ray.training.sharding.add_up`."""
        return add_up(parts)

    def give_weights(self) -> dict[str, Tensor]:
        """The weights of what this rank owns, for the others."""
        return self.shard.give()

    def give_masters(self) -> dict[str, Tensor]:
        """The masters of what this rank owns, for the rank that writes the network."""
        return {name: host_copy(master) for name, master in self.optimizer.masters.items()}

    def take_weights(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in the others' weights, before the step's first forward."""
        self.shard.take(shards)

    def gather_weights(self) -> None:
        """Take in what a backend of its own let go between steps; all ranks together."""
        self.optimizer.gather()

    def bytes_at_rest(self) -> tuple[int, int, int]:
        """Bytes of weights, masters and moments between two steps; of masters and moments alone; of all, unsharded."""
        holder = self.optimizer if isinstance(self.optimizer, DeepSpeedOptimizer) else self.shard
        return holder.bytes_at_rest(), holder.state_bytes(), holder.bytes_whole()

    def state_in_host(self) -> tuple[str, int]:
        """Where this rank computes, and bytes of masters and moments that lie in host memory instead."""
        apart = [m for name, m in self.optimizer.masters.items() if m.device != self.optimizer.parameters[name].device]
        return self.device.type, sum(master.numel() for master in apart) * (MASTER_BYTES + MOMENT_BYTES)

    @property
    def shard(self) -> ShardedOptimizer:
        """The optimizer of a rank of a sharded pool."""
        assert isinstance(self.optimizer, ShardedOptimizer)
        return self.optimizer

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, step: int, norms_squared: Sequence[float]) -> tuple[float, bool]:
        """The optimizer step with the norm over all pools; returns that norm and whether the step was made."""
        stage, inside = self.recipe.stage_at(step)
        return self.optimizer.apply(norms_squared, rates(stage.lr, inside, stage.steps))

    def gradient_digests(self) -> dict[str, str]:
        """The closed gradient's bits by parameter, for comparison with the reference."""
        return digests(self.gradients())

    def weight_digests(self) -> dict[str, str]:
        """The weights' (masters') bits by parameter and buffer."""
        return digests(self.optimizer.weights())

    def gradients(self) -> dict[str, Tensor]:
        """The closed gradient by parameter."""
        return self.optimizer.gradients()

    def state(self) -> WorkerState:
        """A copy of everything that a step changes."""
        return WorkerState.of(self.network, self.optimizer)

    def keep_snapshot(self, step: int) -> None:
        """Keep a copy of the state after ``step`` steps, in this process."""
        self.snapshots.keep(step, self.state())

    def give_snapshot(self, step: int) -> WorkerState:
        """The state kept after ``step`` steps, for another process."""
        return self.snapshots.get(step)

    def take_snapshot(self, step: int, state: WorkerState) -> None:
        """Keep a state that came from another process, and go on from it."""
        self.snapshots.keep(step, state.copy())
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Go back to the state after ``step`` steps; forget everything of steps begun since."""
        self.snapshots.get(step).restore(self.network, self.optimizer)
        self.snapshots.drop_after(step)
        self.forget_step()

    def drop_snapshots(self, before: int) -> None:
        """Forget states older than step ``before``."""
        self.snapshots.drop_before(before)

    def forget_step(self) -> None:
        """Forget gradients, terms and activations of an unfinished step."""
        self.optimizer.clear()
        self.terms, self.pieces = {}, {}

    def save(self, folder: Path) -> None:
        """Write this rank's shard: ``model/NAME`` (rank 0) and its part of ``optimizer/`` under a checkpoint folder."""
        self._shard_writer(folder)()

    def start_saving(self, folder: Path, masters: Sequence[Mapping[str, Tensor]] = ()) -> None:
        """Like :meth:`save`, while the worker goes on; ``masters``: of every rank, on rank 0 of a sharded pool."""
        self.saving.start(self._shard_writer(folder, masters))

    def saving_status(self, wait: bool = False) -> str:
        """``writing``, ``done``, or what went wrong with :meth:`start_saving`."""
        return self.saving.status(wait)

    def _shard_writer(self, folder: Path, masters: Sequence[Mapping[str, Tensor]] = ()) -> Callable[[], None]:
        """Writes the state of now, from a copy in host memory."""
        rank = self.rank
        weights: int | None = sum(m.numel() * m.element_size() for m in self.optimizer.masters.values())
        if isinstance(self.optimizer, ShardedOptimizer):
            weights = None
            network = self.optimizer.trained_with(masters) if rank.rank == 0 else None
        else:
            network = self.optimizer.trained(here=rank.rank == 0)
        tensors = self.optimizer.state_tensors()
        return lambda: write_shard(folder, self.network_name, rank.rank, rank.ranks, network, tensors, weights)

    def load(self, folder: Path) -> None:
        """Take weights and optimizer state from a checkpoint folder, however many ranks wrote it."""
        self.build(folder / "model" / self.network_name)
        self.optimizer.load_state_tensors(load_optimizer(folder, self.network_name))


class EncoderWorker(NetworkWorker):
    """An encoder of media items: features forward, gradients back, tile by tile.

    A tile is a fixed batch of items: its rows, and so its bits, do not depend on which rank runs it.
    """

    def __init__(self, recipe: Recipe, rank: Rank) -> None:
        super().__init__(recipe, rank)
        self._kept: dict[int, list[tuple[int, Tensor | None, list[Any], tuple[int, ...]]]] = {}

    def forget_step(self) -> None:
        """Forget gradients, terms and activations of an unfinished step."""
        super().forget_step()
        self._kept = {}

    def encode(self, media: Sequence[Any]) -> tuple[Tensor, tuple[int, ...]]:
        """One tile: decoded media in, rows [sum of lengths, D] and rows per item out."""
        raise NotImplementedError

    @torch.no_grad()
    def features(self, media: Sequence[Any]) -> list[Tensor]:
        """Rows [n, D] of every item, for serving; item by item, so that nobody's rows depend on who else asks."""
        return [self.encode([item])[0] for item in media]

    def forward(self, micro_batch: int, items: Sequence[ItemRoute], media: Mapping[int, Any]) -> list[EmbeddingBatch]:
        """Features of this rank's items of a micro-batch.

        Args:
            micro_batch: Its number in the step.  items: Their routes, in id order.  media: Decoded media by item id.
        Returns:
            ``num_chunks`` embedding batches, without autograd history.
        """
        kept, out = [], []
        for tile, members in tiles_of(items) if self.ordered else [(micro_batch, list(items))]:
            inputs = [media[item.id] for item in members]
            recompute = self.pool.recompute == "full"
            with torch.set_grad_enabled(self.live and not recompute):
                rows_ID, lengths = self.encode(inputs)
            ids = tuple(item.id for item in members)
            out.append(EmbeddingBatch(values_ID=rows_ID.detach(), item_ids=ids, lengths=lengths))
            if self.live:
                kept.append((tile, None if recompute else rows_ID, inputs if recompute else [], ids))
        if self.live:
            self._kept[micro_batch] = kept
        return split(join(out), self.recipe.schedule.num_chunks)

    def backward(self, micro_batch: int, gradients: Sequence[EmbeddingBatch]) -> None:
        """Add this micro-batch's terms to the gradient, tile after tile.

        Args:
            micro_batch: Its number in the step.  gradients: Pieces whose items are those of :meth:`forward`.
        """
        gradient_ID = join(gradients).values_ID.to(self.device)
        start = 0
        for tile, rows_ID, inputs, _ in self._kept.pop(micro_batch):
            if rows_ID is None:
                rows_ID, _ = self.encode(inputs)
            stop = start + rows_ID.shape[0]
            rows_ID.backward(gradient_ID[start:stop])
            start = stop
            self.keep_term(tile)
