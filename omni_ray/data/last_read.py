"""What was read from the last few media, so that a header is not read once for its rows and again for its pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")

_KEPT = 8
_LARGEST = 64 * 2**20
"""Media of more bytes are not held on to."""


class LastRead(threading.local, Generic[Value]):
    """The values of the last few media of this thread, found by the very same bytes object."""

    def __init__(self) -> None:
        self._kept: list[tuple[bytes, Value]] = []

    def get(self, raw: bytes, read: Callable[[], Value]) -> Value:
        """The kept value, or a new one; what ``read`` raises is not kept."""
        for known, value in self._kept:
            if known is raw:
                return value
        value = read()
        if len(raw) <= _LARGEST:
            self._kept = [(raw, value), *self._kept[: _KEPT - 1]]
        return value
