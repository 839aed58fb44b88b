"""Prompts are read by one deployment and answers made by another: which rows of a session lie where.

Both hold the session's cache. Prompt rows go to the reading stage; before an answer the making stage gets those that it
lacks, and before the next prompt the reading stage gets the answer's. Rows go from replica to replica; nothing of them
passes here, and what one stage computed is never computed by the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError

End = Literal["prefill", "language"]
"""The reading stage, and the making one."""


class Ends(Protocol):
    """The two stages; any method may raise :class:`SessionLostError` or ``ApiError``."""

    async def read(self, session: str, at: int, rows: Rows) -> None:
        """Cut the reading stage's rows back to ``at`` and append."""
        ...

    def part(self, end: End, session: str, start: int, stop: int) -> Any:
        """Ask a stage for rows [start, stop); what comes back is passed on unseen."""
        ...

    async def take(self, session: str, part: Any) -> None:
        """Give the reading stage rows of the other."""
        ...

    def make(self, session: str, part: Any, at: int, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """Give the making stage rows of the other, which end at ``at``, and have it answer."""
        ...


@dataclass(slots=True)
class _Held:
    read: int = 0
    """Rows that the reading stage holds."""
    same: int = 0
    """First rows that both hold alike."""


class Split:
    """``Stages.extend`` and ``Stages.answer`` over two stages; one operation of a session at a time."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See ``Stages.extend``; rows of an answer that stand before ``at`` come over first."""
        held = self._held.setdefault(session, _Held())
        try:
            if at > held.read:
                part = self._ends.part("language", session, held.read, at)
                await self._ends.take(session, part)
                held.read = held.same = at
            await self._ends.read(session, at, rows)
        except SessionLostError:
            self._held.pop(session, None)
            raise
        held.read, held.same = at + len(rows), min(held.same, at)

    async def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See ``Stages.answer``."""
        await self.extend(session, at, rows)
        held = self._held[session]
        try:
            part = self._ends.part("prefill", session, held.same, held.read)
            held.same = held.read
            async with aclosing(self._ends.make(session, part, held.read, options)) as parts:  # type: ignore[type-var]
                async for made in parts:
                    yield made
        except SessionLostError:
            self._held.pop(session, None)
            raise

    def forget(self, session: str) -> None:
        """Nothing is held for a session any more."""
        self._held.pop(session, None)
