"""The workers of one training as seen by each of them, and sums whose order does not depend on how many there are.

A batch is cut into a fixed number of parts. Whoever computes a part, its gradient has the same bits; parts are summed
in their order. So one, two or four workers make the same weights, bit for bit, on machines that compute alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni_ray.types.errors import ConfigError

EXCHANGE_VALUES = 1 << 22
"""Values of one part that are exchanged at a time (16 MiB): the exchange's memory is bounded."""


class Group(Protocol):
    """What the loop asks of its fellow workers."""

    rank: int
    size: int

    def gather(self, own: Tensor) -> list[Tensor]:
        """Everybody's tensor of one shape, by rank."""
        ...

    def gather_objects(self, own: Any) -> list[Any]:
        """Everybody's object, by rank."""
        ...


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def gather(self, own: Tensor) -> list[Tensor]:
        """Its own."""
        return [own]

    def gather_objects(self, own: Any) -> list[Any]:
        """Its own."""
        return [own]


class TorchGroup:
    """The default group of ``torch.distributed``, which Ray Train sets up before the worker's function runs."""

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gather(self, own: Tensor) -> list[Tensor]:
        """All-gather, on the tensor's device."""
        out = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(out, own.contiguous())
        return out

    def gather_objects(self, own: Any) -> list[Any]:
        """All-gather of pickles."""
        out: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(out, own)
        return out


def own_parts(parts: int, group: Group) -> range:
    """Which parts a worker computes: a row of neighbours, so that ranks in order are parts in order.

    Raises:
        ConfigError: the workers do not share the parts evenly.
    """
    if parts % group.size:
        fitting = [count for count in range(1, parts + 1) if parts % count == 0]
        raise ConfigError(
            f"{group.size} workers cannot share {parts} parts evenly; choose --workers from {fitting}, "
            "or change the phase's parts"
        )
    share = parts // group.size
    return range(group.rank * share, (group.rank + 1) * share)


def summed_in_order(own_PV: Tensor, group: Group) -> Tensor:
    """Sum over all parts of all workers, part by part in order.

    Args:
        own_PV: [own parts, values].
    Returns:
        [values], the same bits on every worker and for any number of workers.
    """
    total_V = torch.empty_like(own_PV[0])
    for first in range(0, own_PV.shape[1], EXCHANGE_VALUES):
        window = slice(first, first + EXCHANGE_VALUES)
        rows = [row for gathered in group.gather(own_PV[:, window].contiguous()) for row in gathered]
        sum_V = rows[0].clone()
        for row in rows[1:]:
            sum_V += row
        total_V[window] = sum_V
    return total_V


def flat_gradients(weights: Sequence[nn.Parameter]) -> Tensor:
    """Gradients one after another, zeros where a weight has none; they are forgotten."""
    parts = [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights]
    for weight in weights:
        weight.grad = None
    return torch.cat(parts)


def set_gradients(weights: Sequence[nn.Parameter], flat_V: Tensor) -> None:
    """The reverse of :func:`flat_gradients`."""
    first = 0
    for weight in weights:
        weight.grad = flat_V[first : first + weight.numel()].view_as(weight).clone()
        first += weight.numel()
