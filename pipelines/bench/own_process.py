"""One side of a ratio in a process of its own: what it frees serves nobody else, and it inherits nobody's memory."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from omni_ray.types.errors import OmniError

Side = tuple[Any, Callable[[], float]]
"""What there is to tell once, and the work, which returns its figure each time."""
PATIENCE_S = 30


class OwnProcess:
    """Calls of this object do the work once, over there, and return its figure; the caller waits meanwhile."""

    def __init__(self, make: Callable[..., Side], *arguments: Any) -> None:
        """Start the process and wait until the side is made.

        Args:
            make: A function of a module, called with the arguments over there; all of it can be pickled.
        Raises:
            OmniError: the side could not be made, with what it said.
        """
        context = multiprocessing.get_context("spawn")
        self._wire, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, make, arguments), daemon=True)
        self._process.start()
        there.close()
        try:
            self.told: Any = self._answer()
        except BaseException:
            self.close()
            raise

    def __call__(self) -> float:
        """One run."""
        return float(self._answer(True))

    def _answer(self, *asked: Any) -> Any:
        try:
            for question in asked:
                self._wire.send(question)
            good, value = self._wire.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE_S)
            raise OmniError(
                f"a side's process ended with code {self._process.exitcode}; see its output above"
            ) from None
        if not good:
            raise OmniError(f"a side failed in its process:\n{value}")
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process: by itself between two runs, killed if one goes on for long."""
        self._wire.close()
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(wire: Connection, make: Callable[..., Side], arguments: tuple[Any, ...]) -> None:
    with suppress(EOFError, OSError):  # nobody listens any more
        good, made = _attempt(lambda: make(*arguments))
        wire.send((good, made[0] if good else made))
        while good and wire.recv():
            good, value = _attempt(made[1])
            wire.send((good, value))


def _attempt(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether it went well, and what it gave, or said."""
    try:
        return True, work()
    except Exception:
        return False, traceback.format_exc()
