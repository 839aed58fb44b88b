"""Decoded samples kept for the next epoch, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

_PER_SAMPLE = 2048
"""Bytes of a sample's own objects, besides its arrays."""


class DecodedCache:
    """The most recently used values, as many as fit; not shared between threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The kept value, or a new one; what ``make`` raises is not kept.

        Args:
            size: Bytes of a value's arrays.
        """
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found[0]
        value = make()
        room = size(value) + _PER_SAMPLE
        if room <= self.most_bytes:
            self._kept[key] = value, room
            self.bytes += room
            while self.bytes > self.most_bytes:
                self.bytes -= self._kept.popitem(last=False)[1][1]
        return value

    def take(self, key: Hashable) -> Any | None:
        """The kept value, which is then no longer kept; None where there is none."""
        value, room = self._kept.pop(key, (None, 0))
        self.bytes -= room
        return value
