"""The door between a training and those who look at it: open between two steps, shut while one runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

LINGER_S = 0.05
"""An answer is some calls, one after another: after the last one the door stays open as long as the next may take."""
POLL_S = 0.002


class Door:
    """Belongs to one event loop; another thread may read :attr:`knocking`."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._waiting = self._inside = 0
        self._left = 0.0

    @property
    def knocking(self) -> bool:
        """Somebody waits to be let in."""
        return self._waiting > 0

    @contextlib.asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Wait until the door is open, and hold it open."""
        self._waiting += 1
        try:
            while not self._open.is_set():
                await self._open.wait()
        finally:
            self._waiting -= 1
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._left = asyncio.get_running_loop().time()

    async def let_in(self, most_s: float) -> None:
        """Open until nobody has asked for a moment, for ``most_s`` at most; returns when all are out."""
        now = asyncio.get_running_loop().time
        until = now() + most_s
        self._left = now()
        self._open.set()
        try:
            while now() < until and (self._inside or self._waiting or now() - self._left < LINGER_S):
                await asyncio.sleep(POLL_S)
        finally:
            self._open.clear()
        while self._inside:
            await asyncio.sleep(POLL_S)
