"""The actors of the bridge bench: encoder and language ranks, the inner group's root, and the two ends of a hop."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from actors.group import InnerBridge, PoolGroup, free_address
from actors.transport import ObjectStoreTransport
from omni_ray.bridge.redistribute import BridgeLayout, Item, aggregate, scatter_back
from omni_ray.bridge.redistribute import ContextStore as Store
from omni_ray.types.batch import EmbeddingBatch

HIDDEN = 32


def features_of(items: Sequence[Item], seed: int) -> Tensor:
    """Made-up features of items, a function of their ids alone: [rows, HIDDEN]."""
    rows = [torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed * 100003 + i)) for i, n in items]
    return torch.cat(rows) if rows else torch.zeros(0, HIDDEN)


def language_loss(rows_ID: Tensor) -> Tensor:
    """A loss whose gradient differs from row to row."""
    scale = torch.arange(1, rows_ID.shape[0] + 1, dtype=rows_ID.dtype).unsqueeze(1)
    return (torch.tanh(rows_ID) * scale).sum()


class PairRank:
    """Encoder rank r and language rank r of every pair of pool sizes."""

    def encode(self, lists: Sequence[Sequence[Item]], num_chunks: int, seed: int, flip: bool = False) -> Any:
        """Pieces for every language rank and chunk, flat; ``lists``: this rank's items by language rank."""
        out = []
        for items in lists:
            rows_ID = features_of(items, seed)
            if flip and rows_ID.numel():
                rows_ID.view(torch.int32)[0, 0] ^= 1
                flip = False
            layout = BridgeLayout.of([items], num_chunks)
            out += [rows_ID[slice(*layout.sender_rows(0, chunk))].numpy() for chunk in range(num_chunks)]
        return out[0] if len(out) == 1 else out

    def language(
        self, lists: Sequence[Sequence[Item]], order: Sequence[int], num_chunks: int, *pieces: np.ndarray
    ) -> list[Any]:
        """Values in token order, then the gradient pieces by sender and chunk; ``pieces``: by sender and chunk."""
        layout = BridgeLayout.of(lists, num_chunks)
        store = Store(layout, HIDDEN, torch.zeros(0))
        tensors = [torch.from_numpy(piece.copy()) for piece in pieces]
        for chunk in range(num_chunks):
            store.write(chunk, aggregate(layout, chunk, tensors[chunk::num_chunks]))
        rows_ID = store.read(order).requires_grad_()
        language_loss(rows_ID).backward()
        assert rows_ID.grad is not None
        store.write_gradient(order, rows_ID.grad)
        back = [scatter_back(layout, chunk, store.read_gradient(chunk)) for chunk in range(num_chunks)]
        flat = [back[chunk][sender].numpy() for sender in range(len(lists)) for chunk in range(num_chunks)]
        return [rows_ID.detach().numpy(), *flat]

    def gradient(self, *pieces: np.ndarray) -> np.ndarray:
        """An encoder rank's gradient, its pieces one under another."""
        return np.concatenate(pieces) if pieces else np.zeros((0, HIDDEN), np.float32)


class TrackedBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made inside the block and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note new storages."""
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self.live:
            return
        self.live[key] = size
        self.now_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now_bytes -= self.live.pop(key, 0)


class GroupRank:
    """A rank of an inner group over torch.distributed; rank 0 measures what it holds beyond the store."""

    def address(self) -> str:
        """Where the group meets."""
        return free_address("127.0.0.1")

    def join(self, rank: int, ranks: int, address: str) -> None:
        """Enter the group."""
        torch.set_num_threads(1)
        self.group = PoolGroup("bridge", rank, ranks, address, timeout_s=60)

    def run(self, lists: Sequence[Sequence[Item]], num_chunks: int, cp: int, hidden: int) -> tuple[float, float]:
        """Peak bytes while rows travel, beyond the rank's own rows and its store: (tracked, of the process)."""
        layout = BridgeLayout.of(lists, num_chunks)
        rank = self.group.rank
        rows_ID = torch.full((sum(n for _, n in lists[rank]), hidden), float(rank))
        store = Store(layout, hidden // cp, rows_ID) if rank < cp else None
        if store is not None:
            store.values_IH.fill_(1.0)  # touched, so that its pages are there before the count begins
        bridge = InnerBridge(self.group, cp)
        tracked = TrackedBytes()
        before = _reset_peak()
        with tracked:
            for chunk in range(num_chunks):
                bridge.chunk_forward(layout, chunk, rows_ID, store)
        peak = _status_bytes("VmHWM") - before
        if store is not None:
            self._check(layout, store)
        return float(tracked.peak_bytes), float(peak)

    def _check(self, layout: BridgeLayout, store: Store) -> None:
        for part in layout.parts:
            assert bool((store.values_IH[part.offset : part.offset + part.rows] == part.sender).all())


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(text.split(f"{name}:")[1].split()[0]) * 1024


class HopEnd:
    """Sender or receiver of one large batch."""

    def __init__(self, rows: int, width: int) -> None:
        torch.set_num_threads(1)
        self.values_ID = torch.ones(rows, width)
        self.batch = EmbeddingBatch(values_ID=self.values_ID, item_ids=(0,), lengths=(rows,))
        self.transport = ObjectStoreTransport()
        self.target = torch.empty_like(self.values_ID)

    def send(self, kind: str) -> list[Any]:
        """Put the batch as the bridge does, or the bare numpy view, or the tensor; returns its handle in a list."""
        import ray

        if kind == "bridge":
            return [self.transport.send(self.batch, ("language", 0))]
        return [ray.put(self.values_ID.numpy() if kind == "numpy" else self.values_ID)]

    def receive(self, kind: str, handle: list[Any]) -> float:
        """Take it and read one value."""
        import ray

        if kind == "bridge":
            return float(self.transport.receive(handle[0]).values_ID[-1, -1])
        return float(ray.get(handle[0])[-1, -1])

    def memcpy_s(self) -> float:
        """Seconds of one copy into memory that is there already."""
        started = time.perf_counter()
        self.target.copy_(self.values_ID)
        return time.perf_counter() - started
