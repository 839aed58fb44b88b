"""The thread that owns the language engine: calls of many sessions go in, rows come out as they are made."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from omni_ray.inference.requests import CachePart
from omni_ray.observability.events import emit
from omni_ray.types.errors import ResourceError
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError

ROW_S = 0.060
"""Sound of one row: the pace of an answer that is far enough ahead of its listener."""
QUICK_ROW_S = 0.020
"""Least time between rows of an answer that is being heard: what is stopped has then hardly a row on its way."""
FIRST_ROWS = 5
"""Made at once: the decoder needs them for its first sound."""
UNPACED = 1 << 30
"""``burst_rows`` of an answer that nobody listens to as it is made."""
IDLE_WAIT_S = 0.25


@dataclass(eq=False, slots=True)
class _Answer:
    """Where an answer's rows go."""

    session: str
    options: AnswerOptions
    put: Callable[[AnswerRows | BaseException | None], object]
    began: float = field(default_factory=time.monotonic)
    made: int = 0

    def due(self) -> float:
        """When the next row may be made: a few at once, then ahead of the listener, at last at the listener's pace."""
        if self.options.burst_rows >= UNPACED or self.made < FIRST_ROWS:
            return 0.0
        quick = self.began + (self.made - FIRST_ROWS) * QUICK_ROW_S
        return max(quick, self.began + (self.made - self.options.burst_rows) * ROW_S)


class LanguageLoop:
    """Calls from the event loop to one thread; while answers run, calls are taken in between steps."""

    def __init__(self, engine: SessionEngine) -> None:
        self.engine = engine
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._answers: dict[str, _Answer] = {}
        self._reading: dict[str, Future[None]] = {}
        """Sessions whose rows are read, a piece at a time between the steps of answers, and who waits for that."""
        self.steps = 0
        self.stepped_rows = 0
        self._thread = threading.Thread(target=self._run, name="language", daemon=True)
        self._thread.start()

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See ``Stages.extend``."""

        def call() -> None:
            self._end(session)
            self.engine.feed(session, at, rows)
            if self.engine.unread(session):
                self._reading[session] = read
            else:
                read.set_result(None)

        read: Future[None] = Future()
        read.set_running_or_notify_cancel()
        await self._call(call)
        await asyncio.wrap_future(read)

    async def part(self, session: str, start: int, end: int) -> CachePart:
        """See :meth:`pipelines.serving.session_engine.SessionEngine.part`."""

        def call() -> CachePart:
            self._end(session)
            return self.engine.part(session, start, end)

        part: CachePart = await self._call(call)
        return part

    async def take(self, session: str, part: CachePart) -> None:
        """See :meth:`pipelines.serving.session_engine.SessionEngine.take`."""

        def call() -> None:
            self._end(session)
            self.engine.take(session, part)

        await self._call(call)

    async def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See ``Stages.answer``; rows that were made while nobody looked come together."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(part: AnswerRows | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's event loop has ended, and the caller with it
                loop.call_soon_threadsafe(arrived.put_nowait, part)

        answer = _Answer(session, options, put)

        def call() -> None:
            self._end(session)
            self.engine.start(session, at, rows, options, read=False)
            self._answers[session] = answer

        await self._call(call)
        try:
            while True:
                parts = [await arrived.get()]
                while not arrived.empty():
                    parts.append(arrived.get_nowait())
                failure = next((p for p in parts if isinstance(p, BaseException)), None)
                if failure is not None:
                    raise failure
                made = [p for p in parts if isinstance(p, AnswerRows)]
                if made:
                    yield AnswerRows(
                        ids_R5=np.concatenate([p.ids_R5 for p in made]),
                        ended=made[-1].ended,
                        logprobs=tuple(one for p in made for one in p.logprobs),
                    )
                if parts[-1] is None:
                    return
        finally:
            self._calls.put((lambda: self._stop(answer), Future()))

    def forget(self, session: str) -> None:
        """Free a session, after what was asked before."""

        def call() -> None:
            self._end(session)
            self.engine.forget(session)

        self._calls.put((call, Future()))

    def sweep(self, unused_s: float) -> None:
        """Free sessions that nobody has used for so long.

        Raises:
            ResourceError: the thread has ended.
        """
        if not self._thread.is_alive():
            raise ResourceError("the thread of the language engine has ended; the replica is started again")
        self._calls.put((lambda: self.engine.sweep(unused_s), Future()))

    async def stop(self) -> None:
        """End the thread."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, 5)

    async def _call(self, call: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self._calls.put((call, future))
        return await asyncio.wrap_future(future)

    def _end(self, session: str) -> None:
        waiting = self._reading.pop(session, None)
        if waiting is not None:
            waiting.set_exception(SessionLostError("the session was given something else before its rows were read"))
        answer = self._answers.pop(session, None)
        if answer is not None:
            self.engine.stop(session)
            answer.put(None)

    def _stop(self, answer: _Answer) -> None:
        if self._answers.get(answer.session) is answer:
            self._end(answer.session)

    def _run(self) -> None:
        while True:
            wait = self._wait()
            try:
                item = self._calls.get(timeout=wait) if wait > 0 else self._calls.get_nowait()
            except queue.Empty:
                self._step()
                # Whoever has just begun needs its first rows at once; behind them there is time to read.
                if all(answer.made >= FIRST_ROWS for answer in self._answers.values()):
                    self._read()
                continue
            if item is None:
                return
            call, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)

    def _wait(self) -> float:
        if self._reading:
            return 0.0
        if not self._answers:
            return IDLE_WAIT_S
        return min(answer.due() for answer in self._answers.values()) - time.monotonic()

    def _read(self) -> None:
        """One piece of the session that waits longest; the next time it is another's turn."""
        if not self._reading:
            return
        session = next(iter(self._reading))
        read = self._reading.pop(session)
        try:
            self.engine.read(session)
        except Exception as error:
            read.set_exception(error)
            return
        if self.engine.unread(session):
            self._reading[session] = read
        else:
            read.set_result(None)

    def _step(self) -> None:
        now = time.monotonic()
        due = [answer for answer in self._answers.values() if answer.due() <= now]
        if not due:
            return
        try:
            made = self.engine.step([answer.session for answer in due])
        except Exception as error:  # one step failed for all: each is told, the loop goes on
            emit("language_step_failed", error=type(error).__name__)
            for answer in due:
                self._answers.pop(answer.session, None)
                self.engine.forget(answer.session)
                answer.put(error)
            return
        self.steps += 1
        self.stepped_rows += len(due)
        for answer in due:
            step = made.get(answer.session)
            if step is None:  # a piece of its prompt was read
                continue
            answer.made += 1
            logprobs = () if step.logprob is None else (step.logprob,)
            answer.put(AnswerRows(ids_R5=_array(step.row_5), ended=step.ended, logprobs=logprobs))
            if step.ended or step.full:
                self._answers.pop(answer.session, None)
                answer.put(None)


def _array(row_5: Tensor) -> Any:
    return row_5.cpu().numpy()[None]
