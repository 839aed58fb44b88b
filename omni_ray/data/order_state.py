"""The data position of a run: one small record for shuffle, mixture, packing remainder and place in the curriculum.

Its bytes do not grow with the rows seen: counters are written at a fixed width, and what waits to be placed is bounded
by the packing's lookahead.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omni_ray.types.errors import CheckpointError

VERSION = 1
_LINE = 8
"""Waiting samples are written in lines of so many, so that one more or less seldom shows in the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A sample that was drawn and is not (wholly) placed."""

    stream: str
    """Key of its stream."""
    number: int
    """Which draw of the stream it was."""
    start: int = 0
    """First row that is still to be placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderState:
    """Where the order stands before global step ``step``."""

    step: int = 0
    """Next step."""
    drawn: Mapping[str, int] = field(default_factory=dict)
    """Draws so far by stream."""
    credits: tuple[int, ...] = ()
    """Of the running stage's mixture."""
    buffer: tuple[Held, ...] = ()
    """Packing remainder of the running stage, oldest first."""
    waiting: tuple[Held, ...] = ()
    """What earlier stages left over: drawn again first wherever its stream is."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """What the perplexity gap makes of a subset's weight, by title."""
    rows: tuple[int, int, int] = (0, 0, 0)
    """Rows placed or waiting since the stage began, as text, vision, speech; 0 where they are not counted."""

    def to_record(self) -> dict[str, Any]:
        """Plain JSON."""
        streams = sorted(self.drawn)
        return {
            "version": VERSION,
            "step": self.step,
            "streams": streams,
            "drawn": _written([self.drawn[key] for key in streams]),
            "credits": _written(self.credits),
            "buffer": _held_written(self.buffer, streams),
            "waiting": _held_written(self.waiting, streams),
            "factors": dict(self.factors),
            "rows": _written(self.rows),
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> OrderState:
        """The inverse of :meth:`to_record`.

        Raises:
            CheckpointError: another version, or a record that is not whole.
        """
        if record.get("version") != VERSION:
            raise CheckpointError(
                f"the data position has version {record.get('version')!r}, this program reads {VERSION}; "
                "resume with the program that wrote it"
            )
        try:
            streams = [str(key) for key in record["streams"]]
            text, vision, speech = _read(record["rows"])
            return OrderState(
                step=int(record["step"]),
                drawn=dict(zip(streams, _read(record["drawn"]), strict=True)),
                credits=tuple(_read(record["credits"])),
                buffer=_held_read(record["buffer"], streams),
                waiting=_held_read(record["waiting"], streams),
                factors={str(key): float(value) for key, value in record["factors"].items()},
                rows=(text, vision, speech),
            )
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"the data position cannot be read ({error!r}); take an earlier checkpoint"
            ) from error


def _written(numbers: Sequence[int]) -> str:
    return base64.b64encode(np.array(numbers, dtype="<i8").tobytes()).decode()


def _read(text: str) -> list[int]:
    return [int(number) for number in np.frombuffer(base64.b64decode(text, validate=True), dtype="<i8")]


def _held_written(held: Sequence[Held], streams: Sequence[str]) -> str:
    places = {key: place for place, key in enumerate(streams)}
    rows = [number for piece in held for number in (places[piece.stream], piece.number, piece.start)]
    lines = max(1, -(-len(held) // _LINE))
    return _written(rows + [-1] * 3 * (lines * _LINE - len(held)))


def _held_read(text: str, streams: Sequence[str]) -> tuple[Held, ...]:
    numbers = _read(text)
    triples = [numbers[i : i + 3] for i in range(0, len(numbers), 3)]
    return tuple(Held(stream=streams[s], number=n, start=r) for s, n, r in triples if s >= 0)
