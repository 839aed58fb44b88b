"""Moving embedding batches between actors: numpy views through the shared-memory store, or plainly in one process.

Tensors themselves are never put into the store: pickling them copies (measured 0.25 GB/s), a numpy view of the same
memory travels at several GB/s and arrives read-only without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.snapshot import WorkerState
from omni_ray.inference.requests import CachePart
from omni_ray.types.batch import EmbeddingBatch, OmniBatch
from omni_ray.types.seams import Handle, RankId


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """A carrier with its tensors as numpy arrays."""

    kind: type
    """The carrier's class."""
    fields: dict[str, Any]
    """Its fields, packed."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor whose dtype numpy lacks (bf16), as its bits."""

    bits: np.ndarray
    """int16 view."""
    dtype: str
    """Name of the torch dtype."""


CARRIERS = (EmbeddingBatch, OmniBatch, WorkerState, CachePart)


def pack(value: Any) -> Any:
    """Replace tensors by numpy arrays, through carriers, lists, tuples and mappings."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            return PackedTensor(value.view(torch.int16).numpy(), "bfloat16")
        return value.numpy()
    if isinstance(value, CARRIERS):
        fields = {field.name: pack(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return Packed(type(value), fields)
    if isinstance(value, list | tuple):
        return type(value)(pack(item) for item in value)
    if isinstance(value, Mapping):
        return {key: pack(item) for key, item in value.items()}
    return value


def unpack(value: Any) -> Any:
    """The inverse of :func:`pack` for carriers; tensors share the store's memory and must not be written to."""
    if isinstance(value, Packed):
        return value.kind(**{name: _tensors(item) for name, item in value.fields.items()})
    if isinstance(value, list | tuple):
        return type(value)(unpack(item) for item in value)
    if isinstance(value, dict):
        return {key: unpack(item) for key, item in value.items()}
    return value


def tensor_of(rows: Any) -> Tensor:
    """Rows that were packed by themselves (or an array, or a tensor), as a tensor with memory of its own."""
    return as_tensor(rows).clone()


def as_tensor(packed: Any) -> Tensor:
    """What :func:`pack` made of a tensor by itself, as a tensor; it shares the store's memory."""
    tensor: Tensor = _tensors(packed)
    return tensor


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _view(value)
    if isinstance(value, PackedTensor):
        return _view(value.bits).view(getattr(torch, value.dtype))
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    return unpack(value)


def _view(array: np.ndarray) -> Tensor:
    if array.flags.writeable:
        return torch.from_numpy(array)
    # torch has no read-only tensors and warns about a read-only array; every user of a carrier copies before writing.
    view = array.view()
    interface = dict(view.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return torch.from_numpy(np.asarray(_Writable(interface, array)))


class _Writable:
    """Gives numpy the same memory with the write flag set; keeps the owner alive."""

    def __init__(self, interface: dict[str, Any], owner: np.ndarray) -> None:
        self.__array_interface__ = interface
        self.owner = owner


class InProcessTransport:
    """Sender and receiver are one process: the handle is the batch."""

    def send(self, batch: EmbeddingBatch, to: RankId) -> Handle:
        """Hand over a batch."""
        return batch

    def receive(self, handle: Handle) -> EmbeddingBatch:
        """Take it."""
        return handle


class ObjectStoreTransport:
    """Ray's shared-memory object store; the handle is an ObjectRef, which the driver may hold and pass on."""

    def send(self, batch: EmbeddingBatch, to: RankId) -> Handle:
        """Put a batch into the store of this node."""
        import ray

        return ray.put(pack(batch))

    def receive(self, handle: Handle) -> EmbeddingBatch:
        """Map the batch; it may come from another node."""
        import ray

        return unpack(ray.get(handle))
