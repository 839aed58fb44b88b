"""One line that shows how far, how fast and how long still; silent when nobody is at the terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from omni_ray.observability.events import format_event

REDRAW_EVERY_S = 0.2
RATE_WINDOW = 50
"""The rate is taken over the newest advances, so that a slow start does not spoil the forecast."""


def format_duration(seconds: float) -> str:
    """``47 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Progress of a known amount of work.

    Args:
        title: What is being done, for instance a stage's name.
        total: Units of work.
        unit: Name of a unit, for instance ``step``.
        done: Units already finished (a resumed run); they do not count for the rate.
        stream: Where to draw; drawn only if it is a terminal.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "step",
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._visible = self._stream.isatty()
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)], maxlen=RATE_WINDOW + 1)
        self._drawn_at = float("-inf")
        self._width = 0
        self._line = ""

    @property
    def rate_per_s(self) -> float:
        """Units a second over the newest advances; 0 before the first."""
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    @property
    def left_s(self) -> float:
        """Seconds left at the present rate; infinite while the rate is 0 and work remains."""
        left = max(self._total - self._done, 0)
        if left == 0:
            return 0.0
        return left / self.rate_per_s if self.rate_per_s > 0 else float("inf")

    def advance(self, units: int = 1, **fields: Any) -> None:
        """Note that ``units`` more are done, with figures to show beside them (losses by modality, for instance)."""
        self._done += units
        now_s = self._clock()
        self._marks.append((now_s, self._done))
        self._line = self._text(fields)
        if self._visible and (now_s - self._drawn_at >= REDRAW_EVERY_S or self._done >= self._total):
            self._draw(self._line)
            self._drawn_at = now_s

    def rewind(self, done: int) -> None:
        """Go back to ``done`` units: the work since is done again."""
        self._done = done
        self._marks.clear()
        self._marks.append((self._clock(), done))

    def _text(self, fields: dict[str, Any]) -> str:
        shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in fields.items()}
        left = "?" if self.left_s == float("inf") else format_duration(self.left_s)
        head = f"{self._title} {self._done}/{self._total} {self._unit}s {self.rate_per_s:.2f}/s, {left} left"
        return format_event(head, shown)

    def _draw(self, text: str) -> None:
        # Blanks wipe what a longer earlier line left behind; no escape codes, so dumb terminals are fine.
        self._stream.write("\r" + text + " " * max(self._width - len(text), 0))
        self._stream.flush()
        self._width = len(text)

    def close(self) -> None:
        """Draw the last state and end the line."""
        if self._visible and self._width:
            self._draw(self._line)
            self._stream.write("\n")
            self._stream.flush()
            self._visible = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
