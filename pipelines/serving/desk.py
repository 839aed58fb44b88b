"""Where packets and pictures wait for an encoder: what is due first goes first and takes others along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

WAIT_S = 0.004
"""Longest wait for company, of what has time."""
MOST_TOGETHER = 16

T = TypeVar("T")


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """What waits, and its caller."""

    item: T
    session: str
    due: float
    """Monotonic clock."""
    told: asyncio.Future[Any] = field(repr=False)


class Desk(Generic[T]):
    """Takes items one by one and hands them on in groups; what a group makes does not depend on who is in it."""

    def __init__(self, work: Callable[[Sequence[T]], Awaitable[list[Any]]], wait_s: float = WAIT_S) -> None:
        """``work`` gives a result, or the exception to raise, for every item."""
        self._work, self._wait_s = work, wait_s
        self._waiting: list[_Waiting[T]] = []
        self._task: asyncio.Task[None] | None = None
        self.groups: list[int] = []
        """Sizes of the last groups."""

    async def ask(self, item: T, session: str = "", time_s: float = 0.0) -> Any:
        """The item's result.

        Args:
            session: Whose it is.  time_s: How soon it is needed.
        Raises:
            Exception: what the work has for this item.
        """
        told = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, session, time.monotonic() + time_s, told))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())
        return await told

    def forget(self, session: str) -> None:
        """Nobody wants this session's items any more; those that are being worked on are not told apart."""
        for one in self._waiting:
            if one.session == session and not one.told.done():
                one.told.cancel()

    async def _serve(self) -> None:
        while self._waiting:
            pause_s = min(self._wait_s, min(one.due for one in self._waiting) - time.monotonic())
            if pause_s > 0 and len(self._waiting) < MOST_TOGETHER:
                await asyncio.sleep(pause_s)
            # A caller that has gone wants nothing any more, and its session may be forgotten already.
            ordered = sorted((one for one in self._waiting if not one.told.done()), key=lambda one: one.due)
            chosen, self._waiting = ordered[:MOST_TOGETHER], ordered[MOST_TOGETHER:]
            if chosen:
                await self._answer(chosen)

    async def _answer(self, chosen: Sequence[_Waiting[T]]) -> None:
        self.groups = [*self.groups[-99:], len(chosen)]
        try:
            results = await self._work([one.item for one in chosen])
        except Exception as error:  # the work failed as a whole: each caller is told
            results = [error] * len(chosen)
        for one, result in zip(chosen, results, strict=True):
            if one.told.done():
                continue
            if isinstance(result, BaseException):
                one.told.set_exception(result)
            else:
                one.told.set_result(result)
