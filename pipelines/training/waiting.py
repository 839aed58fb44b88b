"""Waiting for submitted calls, bounded: who is stuck is told by pool, rank and phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.pool import wait_for
from omni_ray.types.errors import HangError


class StuckError(HangError):
    """A hang with the ranks that hold everyone up."""

    def __init__(self, text: str, ranks: Sequence[tuple[str, int]]) -> None:
        super().__init__(text)
        self.ranks = tuple(ranks)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A call on its way."""

    pool: str
    """language, vision, audio, speech, or feeder."""
    rank: int
    """Rank in the pool."""
    phase: str
    """What the call does."""
    micro_batch: int
    """-1 where the call belongs to the whole step."""
    refs: tuple[Any, ...]
    """What it returns."""
    needs: tuple[Any, ...] = ()
    """What it waits for."""


def bounded_get(refs: Sequence[Any], calls: Sequence[Submitted], timeout_s: float, step: int) -> list[Any]:
    """``ray.get`` that gives up when no call ends for ``timeout_s``.

    Args:
        refs: What is wanted.  calls: Everything submitted that may hold it up, in order of submission.

    Raises:
        StuckError: names the ranks whose call runs although all it needs is there.
    """
    ended_before = -1
    while True:
        try:
            values: list[Any] = ray.get(list(refs), timeout=timeout_s)
            return values
        except ray.exceptions.GetTimeoutError:
            ended, _ = wait_for([ref for call in calls for ref in call.refs], 0.0)
            if len(ended) == ended_before:
                raise stuck(calls, set(ended), timeout_s, step) from None
            ended_before = len(ended)


def bounded_get_ready(refs: Sequence[Any], calls: Sequence[Submitted], timeout_s: float, step: int) -> None:
    """Wait until calls have ended, well or not; payloads stay where they are.

    Raises:
        StuckError: as :func:`bounded_get`.
    """
    pending = list(refs)
    while pending:
        ended, pending = wait_for(pending, timeout_s)
        if pending and not ended:
            done, _ = wait_for([ref for call in calls for ref in call.refs], 0.0)
            raise stuck(calls, set(done), timeout_s, step)


def stuck(calls: Sequence[Submitted], ended: set[Any], timeout_s: float, step: int) -> StuckError:
    """The error that names the first unfinished call of every rank whose needs are all there."""
    first: dict[tuple[str, int], Submitted] = {}
    for call in calls:
        if not all(ref in ended for ref in call.refs):
            first.setdefault((call.pool, call.rank), call)
    needed, _ = wait_for([ref for call in first.values() for ref in call.needs], 0.0)
    there = ended | set(needed)
    guilty = [call for call in first.values() if all(ref in there for ref in call.needs)]
    names = "; ".join(
        f"pool {call.pool}, rank {call.rank}, phase {call.phase}"
        + (f", micro-batch {call.micro_batch}" if call.micro_batch >= 0 else "")
        for call in guilty
    )
    return StuckError(
        f"step {step}: nothing ended within {timeout_s:g} s (schedule.timeout_s); still running: {names or 'unknown'}",
        [(call.pool, call.rank) for call in guilty],
    )
