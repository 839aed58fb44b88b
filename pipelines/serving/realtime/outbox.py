"""Frames on their way to one client: in order, counted in bytes, never piling up behind a reader that does not read."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pipelines.serving.realtime.items import new_id

MOST_BYTES = 2 * 2**20
"""Sound waits for room when so much is on its way; what steers the client is always let in."""
HARD_BYTES = 8 * 2**20
MOST_FRAME = 700 * 2**10
"""Largest frame; some client libraries take no more than 1 MiB."""


class Outbox:
    """The sending side of a session."""

    def __init__(self, send: Callable[[str], Awaitable[None]], slow_s: float = 10.0) -> None:
        """``send`` sends one text frame; ``slow_s``: longest time that nothing may move while frames wait."""
        self._send, self._slow_s = send, slow_s
        self._frames: deque[str] = deque()
        self.bytes = 0
        self.sent_bytes = 0
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._moved = time.monotonic()
        self.stuck = asyncio.Event()
        """Set when the client does not read."""

    def put(self, event: Mapping[str, Any]) -> None:
        """Queue an event; it gets its id here."""
        frame = json.dumps({"event_id": new_id("event"), **event}, ensure_ascii=False, separators=(",", ":"))
        self._frames.append(frame)
        if not self.bytes:
            self._moved = time.monotonic()
        self.bytes += len(frame)
        self._wake.set()
        if self.bytes > MOST_BYTES:
            self._room.clear()
        if self.bytes > HARD_BYTES:
            self.stuck.set()

    async def room(self) -> None:
        """Wait until the next piece of sound fits; making it waits with it."""
        await self._room.wait()

    async def run(self) -> None:
        """Send frames until cancelled."""
        while True:
            while not self._frames:
                self._wake.clear()
                await self._wake.wait()
            frame = self._frames.popleft()
            try:
                # Not asyncio.wait_for: before Python 3.12 it forgets a cancellation that comes as the frame leaves.
                async with asyncio.timeout(self._slow_s):
                    await self._send(frame)
            except TimeoutError:
                self.stuck.set()
                return
            self.bytes -= len(frame)
            self.sent_bytes += len(frame)
            self._moved = time.monotonic()
            if self.bytes <= MOST_BYTES:
                self._room.set()

    async def drained(self, timeout_s: float) -> None:
        """Wait until everything was sent, or the time is up."""
        end = time.monotonic() + timeout_s
        while self._frames and time.monotonic() < end and not self.stuck.is_set():
            await asyncio.sleep(0.005)
