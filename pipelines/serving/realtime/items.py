"""Conversation items: their order, their forms on the wire, their rows."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.inference.turn import rows_heard
from omni_ray.types.errors import RequestError
from pipelines.serving.errors import ApiError
from pipelines.serving.realtime.context import Block

FRAME_MS = 60
"""Sound of one generated row."""


def new_id(prefix: str) -> str:
    """An id that cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(slots=True)
class Item:
    """One item of a conversation."""

    id: str
    kind: str = "message"
    """message, function_call or function_call_output."""
    role: str = "user"
    content: list[dict[str, Any]] = field(default_factory=list)
    """Parts in their wire form, media bytes left out."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of items that are no messages."""
    status: str = "completed"
    blocks: list[Block] = field(default_factory=list)
    """Rows of the whole message, from its role to its newline."""
    spoken: Spoken | None = None
    """How an answer's rows, words and sound lie over each other; None for what is not an answer."""
    failure: ApiError | None = None
    """Why it has no rows, where a stage failed on it."""

    def wire(self) -> dict[str, Any]:
        """The item as clients read it."""
        body: dict[str, Any] = {"id": self.id, "object": "realtime.item", "type": self.kind, "status": self.status}
        if self.kind == "message":
            return body | {"role": self.role, "content": [dict(part) for part in self.content]}
        return body | self.extra


@dataclass(slots=True)
class Spoken:
    """An answer's rows in the history."""

    voice: bool
    ids_R5: NDArray[np.int64]
    pieces: list[str]
    """Text that each row added."""
    frame_rows: list[int]
    """Row of each codec frame."""
    audio_ms: float
    """Sound that was sent."""

    def rows_until(self, audio_ms: float) -> int:
        """Rows whose sound lies before ``audio_ms``."""
        frames = min(int(audio_ms // FRAME_MS), len(self.frame_rows))
        if frames >= len(self.frame_rows):
            return len(self.pieces)
        return self.frame_rows[frames]

    def cut(self, rows: int) -> Spoken:
        """The first ``rows`` rows, ended at their last punctuation."""
        keep = rows_heard(self.pieces, rows)
        frames = [row for row in self.frame_rows if row < keep]
        return Spoken(self.voice, self.ids_R5[:keep], self.pieces[:keep], frames, len(frames) * FRAME_MS)

    @property
    def text(self) -> str:
        """Its words."""
        return "".join(self.pieces).strip()


class Conversation:
    """Items in order."""

    def __init__(self) -> None:
        self.id = new_id("conv")
        self.items: list[Item] = []
        self._index: dict[str, Item] = {}

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._index

    def find(self, item_id: str) -> Item:
        """The item.

        Raises:
            RequestError: there is none of that id.
        """
        if item_id not in self._index:
            raise RequestError(f"there is no item {item_id[:80]!r} in this conversation")
        return self._index[item_id]

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Put an item at the end, after another one, or first (``after="root"``); returns the id before it.

        Raises:
            RequestError: the id is taken, or ``after`` is unknown.
        """
        if item.id in self._index:
            raise RequestError(f"an item {item.id[:80]!r} exists already; leave the id out or choose another")
        place = len(self.items)
        if after == "root":
            place = 0
        elif after is not None:
            place = self.items.index(self.find(after)) + 1
        self.items.insert(place, item)
        self._index[item.id] = item
        return self.items[place - 1].id if place else None

    def remove(self, item_id: str) -> Item:
        """Take an item out.

        Raises:
            RequestError: there is none of that id.
        """
        item = self.find(item_id)
        self.items.remove(item)
        del self._index[item_id]
        return item

    @property
    def last_id(self) -> str | None:
        """Id of the last item."""
        return self.items[-1].id if self.items else None
