"""A conversation and the stages that hold its rows: one operation at a time, repeated where a replica was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.observability.events import emit
from omni_ray.types.modality import Modality
from pipelines.serving.realtime.context import Block, CacheView, Template
from pipelines.serving.realtime.hearing import PACKET, LiveTurn, SoundLog
from pipelines.serving.realtime.items import Conversation, Item
from pipelines.serving.resume import TRIES, Progress, encode, gone, lost
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError, Stages

RETAINED = 0.75
"""Share of the room that a conversation keeps when it no longer fits: what is left out is left out at once for many
turns, since all that stands behind it is read again."""


class Dialogue:
    """Items, their rows, and what the stages hold of them."""

    def __init__(self, session: str, stages: Stages, template: Template, positions: int) -> None:
        self.session, self.stages, self.template, self.positions = session, stages, template, positions
        self.conversation = Conversation()
        self.system: Block | None = None
        self.view = CacheView()
        self.recovered = 0
        """Times that a stage had lost the session."""
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        """Told of work that failed and that nobody waits for."""
        self._losses = 0
        self._left_out: set[str] = set()
        """Oldest items that have made room, by id; they stay out."""
        self._reserve = 0
        """Rows of the longest answer so far, so that a turn leaves the room that its answer asks for."""
        self._turnstile = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    def do(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run after everything that was given before; a failure is logged without anyone's words."""

        async def wait_and_run() -> None:
            async with self._turnstile:
                await work()

        return self.beside(wait_and_run())

    def beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run at once; ended with the session."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def instruct(self, words: str) -> None:
        """Set the system message."""
        self.system = self.message("system", words) if words else None

    def message(self, role: str, words: str) -> Block:
        """A whole message of text."""
        parts = [self.template.opening(role), self.template.text(words), self.template.closing(role)]
        return Block(Rows.joined([part.rows for part in parts]))

    def history(
        self, reserve: int, tail: Sequence[Block], items: Sequence[Item] | None = None, instructions: str | None = None
    ) -> list[Block]:
        """Blocks of the conversation with ``tail`` after them; the oldest items are left out where it would not fit.

        Whoever is left out stays out, and :data:`RETAINED` of the room is kept then.

        Args:
            reserve: Rows of the answer.  tail: What stands after the items.
            items: Instead of those of the conversation.  instructions: Instead of the session's.
        """
        system = self.message("system", instructions) if instructions else self.system
        first = [system] if system is not None else []
        own = items is None
        shown = [item for item in (self.conversation.items if items is None else items) if item.blocks]
        if own:
            self._reserve = reserve = max(reserve, self._reserve)
            self._left_out &= {item.id for item in shown}
            shown = [item for item in shown if item.id not in self._left_out]
        room = self.positions - reserve - sum(map(len, first)) - sum(map(len, tail))
        sizes = [sum(map(len, item.blocks)) for item in shown]
        start, total = 0, sum(sizes)
        if total > room:
            while start < len(shown) and total > room * (RETAINED if own else 1.0):
                total -= sizes[start]
                start += 1
            self._left_out |= {item.id for item in shown[:start]} if own else set()
        return [*first, *[block for item in shown[start:] for block in item.blocks], *tail]

    async def sync(self, wanted: Sequence[Block]) -> None:
        """Make the cache hold exactly these blocks.

        Raises:
            ApiError: the language stage failed :data:`TRIES` times.
        """
        for _ in range(TRIES):
            at, rows = self.view.difference(wanted)
            if not len(rows):
                return
            try:
                await self.stages.extend(self.cache_name, at, rows)
            except SessionLostError:
                self._lost()
                continue
            self.view.now_holds(wanted)
            return
        raise gone("language")

    async def generate(self, wanted: Sequence[Block], options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """Rows after these blocks; the last block is always new to the cache.

        A replica that is lost in the middle is replaced by another, which reads what was said and goes on.

        Raises:
            ApiError: the language stage failed :data:`TRIES` times without a row in between.
        """
        progress, failed = Progress(options), 0
        while failed < TRIES:
            at, rows = self.view.difference(wanted)
            try:
                left = progress.left()
                async with aclosing(self.stages.answer(self.cache_name, at, rows, left)) as parts:  # type: ignore[type-var]
                    async for part in parts:
                        failed = 0
                        self.view.now_holds(wanted)
                        progress.note(part)
                        yield part
                return
            except SessionLostError:
                self._lost()
                if progress.ended:
                    return
                failed += 1
        raise gone("language")

    async def hear(self, turn: LiveTurn, packet: int, wave_S: NDArray[np.float32], final: bool, log: SoundLog) -> Any:
        """Rows of a packet; packets before it are given again where the audio stage lost them.

        Raises:
            ApiError: the audio stage failed :data:`TRIES` times.
        """
        for _ in range(TRIES):
            try:
                return await self.stages.hear(self.session, turn.number, packet, wave_S, final)
            except SessionLostError:
                self._lost("audio")
            try:
                for number in range(packet):
                    start = turn.start + number * PACKET
                    again_S = log.cut(start, start + PACKET)
                    await self.stages.hear(self.session, turn.number, number, again_S, False)
            except SessionLostError:
                continue
        raise gone("audio")

    async def see(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows of a picture or pair."""
        return (await encode(self.stages, Modality.VISION, [frames]))[0]

    async def close(self) -> None:
        """End everything and free the stages."""
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(list(self._running), timeout=5)
        self.stages.forget(self.session)
        self.stages.forget(self.cache_name)

    @property
    def cache_name(self) -> str:
        """The session's name at the language stage, another one after every loss.

        A name may move to another replica and back; rows that the first one still has then are never taken for these.
        """
        return f"{self.session}~{self._losses}"

    def _lost(self, stage: str = "language") -> None:
        self.recovered += 1
        if stage == "language":
            self.view.lost()
            self.stages.forget(self.cache_name)
            self._losses += 1
        lost(stage)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            emit("session_task_failed", error=type(task.exception()).__name__)
            self.on_failure(task.exception())  # type: ignore[arg-type]
