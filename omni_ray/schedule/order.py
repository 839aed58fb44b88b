"""The order of calls in a training step: pure, driven by the real step and by a simulator alike.

Every actor runs its calls first in, first out, so the order in which calls are submitted is the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a call does."""

    ENCODE = "encode"
    """Encoder forward of a micro-batch (every modality that it holds)."""
    LANGUAGE = "language"
    """Language forward and backward of a micro-batch; makes the gradient of every feature slot."""
    ENCODER_BACKWARD = "encoder_backward"
    """Encoder backward of a micro-batch from those gradients."""
    BARRIER = "barrier"
    """Wait until everything submitted so far has ended."""


@dataclass(frozen=True, slots=True)
class Call:
    """One thing to submit."""

    kind: Kind
    micro_batch: int = -1
    """-1 for a barrier."""


def barrier_order(order: Sequence[int]) -> list[Call]:
    """Phases one after another: the reference schedule."""
    phases = (Kind.ENCODE, Kind.LANGUAGE, Kind.ENCODER_BACKWARD)
    calls: list[Call] = []
    for phase in phases:
        calls += [Call(phase, index) for index in order]
        calls.append(Call(Kind.BARRIER))
    return calls


def pipelined_order(order: Sequence[int], window: int) -> list[Call]:
    """Encoders run ``window`` micro-batches ahead; a backward is submitted as soon as its gradients are on their way.

    Encode(i + window) is submitted before backward(i): on a first-in-first-out actor a backward that waits for the
    language pool would otherwise hold up every later forward.  Since encode(i + window + 1) stands behind backward(i),
    at most ``window + 1`` micro-batches of features exist at a time: the order itself is the credit.
    """
    calls = [Call(Kind.ENCODE, index) for index in order[:window]]
    for place, index in enumerate(order):
        calls.append(Call(Kind.LANGUAGE, index))
        if place + window < len(order):
            calls.append(Call(Kind.ENCODE, order[place + window]))
        calls.append(Call(Kind.ENCODER_BACKWARD, index))
    return calls


def call_order(kind: str, order: Sequence[int], window: int) -> list[Call]:
    """The calls of a step under a recipe's schedule."""
    return barrier_order(order) if kind == "barrier" else pipelined_order(order, window)
