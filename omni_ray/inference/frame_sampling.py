"""Sparse and dense frames of a live camera: which are looked at, and in which pairs (docs/networks.md 5 and 8).

While the user speaks: two frames a second, one pair a chunk of 1 s.  Otherwise one frame in two seconds is kept, and
what was seen while the assistant spoke stands before the sound of the next turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Frame = TypeVar("Frame")

DENSE_MS = 500
"""Between looks while the user speaks: 2 frames a second."""
SPARSE_MS = 2000
"""Between looks otherwise: 0.5 frames a second."""
CHUNK_MS = 1000
"""One pair of frames and this much sound make a packet."""
MOST_SPARSE = 16
"""Sparse frames kept for the next turn; older ones are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Generic[Frame]):
    """Two frames that the encoder sees together."""

    time_ms: int
    """Of the first, since the camera began."""
    frames: tuple[Frame, Frame]
    """A single frame stands twice."""


@dataclass(frozen=True)
class SamplerState(Generic[Frame]):
    """A camera's stream; never changed in place."""

    dense: bool = False
    """Whether a user's turn is running."""
    last_ms: int | None = None
    """When a frame was last taken."""
    sparse: tuple[tuple[int, Frame], ...] = ()
    """Taken between turns."""
    waiting: tuple[int, Frame] | None = None
    """First frame of a dense pair whose second has not come."""


def look(state: SamplerState[Frame], frame: Frame, time_ms: int) -> tuple[SamplerState[Frame], tuple[Pair[Frame], ...]]:
    """Offer a frame.

    Args:
        state: From the last call.  frame: Anything.  time_ms: Its time; a frame that comes late is left out.
    Returns:
        The next state, and the dense pair that this frame completes, if any.
    """
    every = DENSE_MS if state.dense else SPARSE_MS
    if state.last_ms is not None and time_ms < _next_ms(state.last_ms, every):
        return state, ()
    state = replace(state, last_ms=time_ms)
    if not state.dense:
        return replace(state, sparse=(*state.sparse, (time_ms, frame))[-MOST_SPARSE:]), ()
    if state.waiting is None:
        return replace(state, waiting=(time_ms, frame)), ()
    first_ms, first = state.waiting
    return replace(state, waiting=None), (Pair(time_ms=first_ms, frames=(first, frame)),)


def begin_turn(state: SamplerState[Frame]) -> tuple[SamplerState[Frame], tuple[Pair[Frame], ...]]:
    """The user speaks: look densely; what was seen since the last turn comes first, each frame a pair of itself."""
    history = tuple(Pair(time_ms=time_ms, frames=(frame, frame)) for time_ms, frame in state.sparse)
    return SamplerState(dense=True, last_ms=None), history


def end_turn(state: SamplerState[Frame]) -> tuple[SamplerState[Frame], tuple[Pair[Frame], ...]]:
    """The user has finished: look sparsely; a lone frame becomes a pair of itself."""
    closing: tuple[Pair[Frame], ...] = ()
    if state.waiting is not None:
        time_ms, frame = state.waiting
        closing = (Pair(time_ms=time_ms, frames=(frame, frame)),)
    return SamplerState(dense=False, last_ms=state.last_ms), closing


def _next_ms(last_ms: int, every: int) -> int:
    """A camera's clock trembles: a frame that comes a tenth of the interval early is on time."""
    return last_ms + every - every // 10
