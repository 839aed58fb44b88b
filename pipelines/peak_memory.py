"""The most memory that this process and everything it started held at one time."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

EVERY_S = 2.0
SHARE_OF_TIME = 0.02
"""Reading page tables costs time; the pause after a look is at least this long in proportion."""


class PeakMemory:
    """Samples the process tree in a thread while the block runs.

    Proportional set sizes are summed: a page that several processes share (Ray's object store, torch's libraries) is
    divided among them, so that it counts once. Where the system has none, unique set sizes are summed.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.peak_bytes = 0
        self.looks = 0
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    @property
    def peak_gib(self) -> float:
        """Peak in GiB (2^30 bytes)."""
        return self.peak_bytes / 2**30

    def look(self) -> int:
        """Measure now; returns the bytes held at this moment."""
        held = tree_bytes()
        self.peak_bytes = max(self.peak_bytes, held)
        self.looks += 1
        return held

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            started = time.monotonic()
            self.look()
            took = time.monotonic() - started
            if self._over.wait(max(self._every_s, took / SHARE_OF_TIME)):
                return


def tree_bytes() -> int:
    """Memory of this process and its descendants now."""
    import psutil

    me = psutil.Process()
    return sum(_held(process) for process in [me, *me.children(recursive=True)])


def _held(process: Any) -> int:
    import psutil

    try:
        info = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0
    return int(getattr(info, "pss", 0) or info.uss)
