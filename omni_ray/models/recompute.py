"""Activations made again in the backward instead of kept: whole layers, or the cheap tensors inside them.

Both make the same arithmetic on the same inputs, so gradients are those of keeping everything, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

RecomputeMode = Literal["none", "selective", "full"]
"""``selective``: norms, gates, gathered rows and attention probabilities; ``full``: whole layers."""

Maker = Callable[[], Tensor]


@dataclass(slots=True)
class _Offers:
    """How to make tensors again, by their storage; a weak reference keeps its address from naming another tensor."""

    makers: dict[int, tuple[StorageWeakRef, torch.Size, Maker]] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor | Maker:
        """What autograd keeps in place of ``tensor``."""
        reference = StorageWeakRef(tensor.untyped_storage())
        found = self.makers.get(reference.cdata)
        if found is not None and found[1] == tensor.shape:
            return found[2]
        return tensor

    @staticmethod
    def unpack(kept: Tensor | Maker) -> Tensor:
        """The tensor itself."""
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()


_OFFERS: ContextVar[_Offers | None] = ContextVar("offers", default=None)


def rebuilding() -> bool:
    """Whether cheap tensors are to be made again in the backward."""
    return _OFFERS.get() is not None


def offer(tensor: Tensor, make: Maker) -> None:
    """Say how ``tensor`` can be made again; without :func:`layer_runner`'s selective mode this does nothing.

    Args:
        tensor: A contiguous tensor of its own storage that an operation will save for its backward.
        make: Makes the same bits from tensors that are kept anyway.
    """
    offers = _OFFERS.get()
    if offers is not None:
        reference = StorageWeakRef(tensor.untyped_storage())
        offers.makers[reference.cdata] = (reference, tensor.shape, make)


@contextmanager
def _selective() -> Iterator[None]:
    offers = _Offers()
    token = _OFFERS.set(offers)
    try:
        with saved_tensors_hooks(offers.pack, offers.unpack):
            yield
    finally:
        _OFFERS.reset(token)


def layer_runner(mode: RecomputeMode) -> Callable[..., Any]:
    """A function that calls ``layer(*arguments)`` and keeps for the backward what ``mode`` says."""

    def run(layer: Callable[..., Any], *arguments: Any) -> Any:
        if mode == "full" and torch.is_grad_enabled():
            # No random numbers are drawn in a layer, so none need to be remembered.
            return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        with _selective() if mode == "selective" and torch.is_grad_enabled() else nullcontext():
            return layer(*arguments)

    return run
