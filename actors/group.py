"""A pool's own torch.distributed group: all-reduce of gradients, and the bridge's two-stage way between its ranks.

The group is the process's default one, made before anything else can claim it; gloo on processors, nccl on whole GPUs,
by the same calls.  Every wait is bounded, and its error names pool, rank and phase.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from omni_ray.bridge.redistribute import BridgeLayout, ContextStore, gather_hidden, scatter_back, slices
from omni_ray.types.batch import EmbeddingBatch
from omni_ray.types.errors import HangError

if TYPE_CHECKING:
    from omni_ray.types.seams import Handle, RankId


def free_address(host: str) -> str:
    """``host:port`` for a group's rendezvous; asked of the machine that rank 0 runs on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


class PoolGroup:
    """The ranks of one pool.

    Args:
        pool: Name for errors.  rank, ranks: This process and the size.  address: Output of :func:`free_address`.
        timeout_s: Longest wait inside one collective.  backend: Output of :func:`group_backend`.
    """

    def __init__(self, pool: str, rank: int, ranks: int, address: str, timeout_s: float, backend: str = "gloo") -> None:
        self.pool, self.rank, self.ranks, self.timeout_s = pool, rank, ranks, timeout_s
        self.backend = backend
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        """Where tensors must lie for the group's calls."""
        leave_group()
        with self._bounded("join"):
            dist.init_process_group(
                backend,
                init_method=f"tcp://{address}",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=timeout_s),
            )

    def sum_in_place(self, values: Tensor, phase: str) -> None:
        """Add over all ranks; every rank gets the same bits, whose order of summation is the library's.

        Raises:
            HangError: a peer did not come within the time-out, or is gone.
        """
        with self._bounded(phase):
            if self.backend == "nccl":
                dist.all_reduce(values)
            else:  # gloo adds in host memory
                host = values.cpu()
                dist.all_reduce(host)
                if host is not values:
                    values.copy_(host)

    @contextmanager
    def _bounded(self, phase: str) -> Iterator[None]:
        try:
            yield
        except (
            RuntimeError
        ) as problem:  # torch raises DistBackendError and plain RuntimeError (gloo), both of this kind
            raise HangError(
                f"pool {self.pool}, rank {self.rank}, phase {phase}: the group of {self.ranks} did not answer "
                f"within {self.timeout_s:g} s or lost a peer ({str(problem).splitlines()[0][:120]})"
            ) from problem


def group_backend(device: torch.device, gpu: float) -> str:
    """``nccl`` between whole GPUs, ``gloo`` otherwise: nccl refuses two ranks on one GPU.

    Args:
        device: Where the ranks compute.  gpu: GPUs of one rank.
    """
    return "nccl" if device.type == "cuda" and gpu >= 1 else "gloo"


def leave_group() -> None:
    """Give the process's group back, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class InnerBridge:
    """Two-stage redistribution between the processes of an inner group, chunk after chunk.

    Rank 0 gathers; ranks below ``cp`` keep a slice.  Every rank calls both methods with the same layout.
    """

    def __init__(self, group: PoolGroup, cp: int) -> None:
        self.group, self.cp = group, cp

    def forward(self, layout: BridgeLayout, rows_ID: Tensor) -> ContextStore | None:
        """Send this rank's rows; returns the store of a context rank.

        Args:
            layout: The inner group's lists.  rows_ID: [n, H] features of this rank's list.
        """
        rank, hidden = self.group.rank, rows_ID.shape[1]
        store = ContextStore(layout, hidden // self.cp, rows_ID) if rank < self.cp else None
        for chunk in range(layout.num_chunks):
            self.chunk_forward(layout, chunk, rows_ID, store)
        return store

    def chunk_forward(self, layout: BridgeLayout, chunk: int, rows_ID: Tensor, store: ContextStore | None) -> None:
        """One chunk of :meth:`forward`; rank 0 holds it whole for no longer than this call."""
        mine = rows_ID[slice(*layout.sender_rows(self.group.rank, chunk))]
        if self.group.rank == 0:
            whole_ID = self._gather(layout, chunk, mine)
            for context, part_IH in enumerate(slices(whole_ID, self.cp)):
                if context == 0 and store is not None:
                    store.write(chunk, part_IH)
                elif part_IH.shape[0]:
                    dist.send(part_IH.contiguous(), context)
            return
        if mine.shape[0]:
            dist.send(mine.contiguous(), 0)
        if store is not None:
            first, last = layout.chunk_rows(chunk)
            if last > first:
                dist.recv(store.values_IH[first:last], 0)

    def _gather(self, layout: BridgeLayout, chunk: int, mine: Tensor) -> Tensor:
        first, last = layout.chunk_rows(chunk)
        whole_ID = mine.new_empty(last - first, mine.shape[1])
        row = 0
        for sender in range(len(layout.lists)):
            low, high = layout.sender_rows(sender, chunk)
            target = whole_ID[row : row + high - low]
            if sender == 0:
                target.copy_(mine)
            elif high > low:
                dist.recv(target, sender)
            row += high - low
        return whole_ID

    def backward(self, layout: BridgeLayout, store: ContextStore | None, hidden: int) -> Tensor:
        """The adjoint: the gradient of this rank's rows, [n, H].

        Args:
            store: What :meth:`forward` gave, with its gradient written.  hidden: H.
        """
        back = []
        device = store.values_IH.device if store is not None else self.group.device
        for chunk in range(layout.num_chunks):
            part_IH = store.read_gradient(chunk) if store is not None else None
            if self.group.rank == 0:
                assert part_IH is not None
                pieces = scatter_back(layout, chunk, self._gather_hidden(part_IH))
                for sender, piece in enumerate(pieces):
                    if sender and piece.shape[0]:
                        dist.send(piece.contiguous(), sender)
                back.append(pieces[0])
                continue
            if part_IH is not None and part_IH.shape[0]:
                dist.send(part_IH.contiguous(), 0)
            low, high = layout.sender_rows(self.group.rank, chunk)
            piece = torch.empty(high - low, hidden, device=device)
            if high > low:
                dist.recv(piece, 0)
            back.append(piece)
        return torch.cat(back)

    def _gather_hidden(self, part_IH: Tensor) -> Tensor:
        parts = [part_IH]
        for context in range(1, self.cp):
            other = torch.empty_like(part_IH)
            if other.shape[0]:
                dist.recv(other, context)
            parts.append(other)
        return gather_hidden(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHandle:
    """What a receiver must know of a batch that waits in a group."""

    sender: int
    """Rank that sent it."""
    shape: tuple[int, ...]
    """Of its values."""
    dtype: torch.dtype
    """Of its values."""
    item_ids: tuple[int, ...]
    """As in the batch."""
    lengths: tuple[int, ...]
    """As in the batch."""
    starts: tuple[int, ...]
    """As in the batch."""


class GroupTransport:
    """Point to point over a process group; a rank receives from another in the order in which that one sent.

    Args:
        rank: This one.  rank_of: Who is rank 0, 1, ...  device: Where the group's backend wants tensors.
    """

    def __init__(self, rank: int, rank_of: Sequence[RankId], device: torch.device | str = "cpu") -> None:
        self.rank, self.device = rank, torch.device(device)
        self._rank_of = {named: place for place, named in enumerate(rank_of)}
        self._own: list[Tensor] = []
        self._flying: list[tuple[dist.Work, Tensor]] = []

    def send(self, batch: EmbeddingBatch, to: RankId) -> Handle:
        """Start sending; the values must not change until the receiver has them."""
        self._flying = [(work, kept) for work, kept in self._flying if not work.is_completed()]
        values = batch.values_ID.detach().to(self.device).contiguous()
        target = self._rank_of[to]
        if target == self.rank:
            self._own.append(values)
        elif values.numel():
            work = dist.isend(values, target)
            assert work is not None
            self._flying.append((work, values))
        return GroupHandle(
            sender=self.rank,
            shape=tuple(values.shape),
            dtype=values.dtype,
            item_ids=batch.item_ids,
            lengths=batch.lengths,
            starts=batch.starts,
        )

    def receive(self, handle: Handle) -> EmbeddingBatch:
        """Wait for a batch."""
        values = torch.empty(handle.shape, dtype=handle.dtype, device=self.device)
        if handle.sender == self.rank:
            values = self._own.pop(0)
        elif values.numel():
            dist.recv(values, handle.sender)
        return EmbeddingBatch(values_ID=values, item_ids=handle.item_ids, lengths=handle.lengths, starts=handle.starts)
