"""Turn-taking as a pure function: what was heard goes in, what it means comes out; no clock, no model, no transport.

The times are those of the report's Figure 11: t1 start of a turn, t2 last speech, t3 answering begins unseen, t4 the
turn has ended and sound may leave, t5 the user speaks into the answer.  Time is counted in samples at 16 kHz since the
stream began, so that a recorded trace always gives the same events.
Source: LongCat-Flash-Omni report, Figure 11; docs/networks.md section 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from omni_ray.config.serving import TurnConfig

SAMPLE_RATE_HZ = 16000
"""Of every sample count here."""
_PER_MS = SAMPLE_RATE_HZ // 1000
_TRAIL = 2 * 512
"""Samples by which a detector's end of speech lies behind the sound's own, at most: two windows."""
BREAKPOINTS = frozenset(
    ".!?,;:\N{HORIZONTAL ELLIPSIS}\N{IDEOGRAPHIC FULL STOP}\N{FULLWIDTH COMMA}"
    "\N{IDEOGRAPHIC COMMA}\N{FULLWIDTH EXCLAMATION MARK}\N{FULLWIDTH QUESTION MARK}"
    "\N{FULLWIDTH SEMICOLON}\N{FULLWIDTH COLON}\n"
)
"""Characters after which a spoken answer may be cut."""


class Phase(StrEnum):
    """Where a conversation stands."""

    IDLE = "idle"
    """Nobody speaks."""
    LISTEN = "listen"
    """The user's turn; packets are prefilled as they come."""
    SPECULATE = "speculate"
    """The user has paused; an answer is made, unseen."""
    SPEAK = "speak"
    """The turn has ended; the answer leaves."""


class Sign(StrEnum):
    """What has happened."""

    TURN_START = "turn_start"
    """t1, dated to the first window of speech less the prefix."""
    SPECULATE = "speculate"
    """t3: make an answer to what was heard up to here."""
    ROLLBACK = "rollback"
    """The user goes on: forget that answer."""
    TURN_END = "turn_end"
    """t4: the answer may leave now.  ``speech_end`` is t2."""
    INTERRUPT = "interrupt"
    """t5: stop the sound; a turn start follows."""
    DONE = "done"
    """The answer was heard to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A sign and its place in the stream."""

    sign: Sign
    """What has happened."""
    at: int
    """Sample to which it is dated."""
    speech_end: int = 0
    """t2 of the turn: the sample after its last window of speech."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of the detector."""

    probability: float
    """Of speech, 0..1."""
    start: int
    """First sample."""
    end: int
    """Sample after its last."""
    loud_end: int | None = None
    """Sample after its last that rises out of the noise; None: not measured, as good as ``end``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Samples have arrived up to here; deadlines are kept to the sample, not to the detector's window."""

    until: int


class Order(StrEnum):
    """What else moves the machine."""

    COMMIT = "commit"
    """Push-to-talk, or a client with its own detector: the user's turn has ended."""
    CLEAR = "clear"
    """Forget the turn that is being heard."""
    SPEAK = "speak"
    """An answer leaves that no turn of the user's has asked for."""
    SPOKEN = "spoken"
    """The answer was heard to its end, or there is none."""


Signal = Window | Heard | Order


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnState:
    """All that the machine remembers."""

    phase: Phase = Phase.IDLE
    """Where the conversation stands."""
    heard: int = 0
    """Samples seen so far."""
    onset: int | None = None
    """First sample of a run of speech that has not yet become a turn or a barge-in."""
    run: int = 0
    """Samples of speech in that run."""
    turn_start: int = 0
    """t1 of the turn that is being heard."""
    speech_end: int = 0
    """t2 so far."""


def advance(state: TurnState, signal: Signal, config: TurnConfig) -> tuple[TurnState, tuple[Event, ...]]:
    """One step.

    Args:
        state: From the last step; ``TurnState()`` begins.
        signal: A window of the detector, newly arrived samples, or an order.
        config: Thresholds and silences.
    Returns:
        The next state and what happened, in order.
    """
    if isinstance(signal, Order):
        return _ordered(state, signal)
    if isinstance(signal, Window):
        state, events = _window(state, signal, config)
        after, deadlines = _deadlines(state, signal.end, config)
        return after, events + deadlines
    return _deadlines(state, signal.until, config)


def run_trace(signals: Iterable[Signal], config: TurnConfig) -> list[Event]:
    """All events of a recorded trace."""
    state = TurnState()
    events: list[Event] = []
    for signal in signals:
        state, found = advance(state, signal, config)
        events += found
    return events


def _window(state: TurnState, window: Window, config: TurnConfig) -> tuple[TurnState, tuple[Event, ...]]:
    speaking = state.phase in (Phase.LISTEN, Phase.SPECULATE)
    if speaking:
        # Inside a turn: a lower bar, so that a soft end of a word is not yet silence. A pause is left at the full bar.
        bar = config.threshold - (config.release if state.phase == Phase.LISTEN else 0.0)
        if window.probability < bar:
            return state, ()
        resumed = replace(state, phase=Phase.LISTEN, speech_end=max(state.speech_end, _last_speech(window)))
        if state.phase == Phase.SPECULATE:
            return resumed, (Event(sign=Sign.ROLLBACK, at=window.start, speech_end=state.speech_end),)
        return resumed, ()
    if window.probability < config.threshold:
        return replace(state, onset=None, run=0), ()
    onset = window.start if state.onset is None else state.onset
    run = state.run + window.end - window.start
    needed = config.interrupt_ms if state.phase == Phase.SPEAK else config.start_ms
    if run < needed * _PER_MS:
        return replace(state, onset=onset, run=run), ()
    start = max(0, onset - config.prefix_ms * _PER_MS)
    events: tuple[Event, ...] = (Event(sign=Sign.TURN_START, at=start),)
    if state.phase == Phase.SPEAK:
        events = (Event(sign=Sign.INTERRUPT, at=window.end), *events)
    begun = replace(state, phase=Phase.LISTEN, onset=None, run=0, turn_start=start, speech_end=window.end)
    return begun, events


def _last_speech(window: Window) -> int:
    """The end of speech in a window of speech: where the sound falls back into the noise.

    A detector remembers, and calls the first windows after a word speech too.  It is believed less by two windows only,
    so that somebody who speaks into noise as loud as the voice is not cut off.
    """
    if window.loud_end is None:
        return window.end
    return min(window.end, max(window.loud_end, window.end - _TRAIL))


def _deadlines(state: TurnState, until: int, config: TurnConfig) -> tuple[TurnState, tuple[Event, ...]]:
    """Silences that have become long enough by ``until``."""
    state = replace(state, heard=max(state.heard, until))
    events: list[Event] = []
    speculate_at = state.speech_end + config.speculate_ms * _PER_MS
    end_at = state.speech_end + config.silence_ms * _PER_MS
    longest_at = state.turn_start + int(config.max_turn_s * SAMPLE_RATE_HZ)
    if state.phase == Phase.LISTEN and state.heard >= longest_at:
        events.append(Event(sign=Sign.TURN_END, at=longest_at, speech_end=longest_at))
        return replace(state, phase=Phase.SPEAK, onset=None, run=0), tuple(events)
    if state.phase == Phase.LISTEN and speculate_at <= state.heard and speculate_at < end_at:
        events.append(Event(sign=Sign.SPECULATE, at=speculate_at, speech_end=state.speech_end))
        state = replace(state, phase=Phase.SPECULATE)
    if state.phase in (Phase.LISTEN, Phase.SPECULATE) and end_at <= state.heard:
        events.append(Event(sign=Sign.TURN_END, at=end_at, speech_end=state.speech_end))
        state = replace(state, phase=Phase.SPEAK, onset=None, run=0)
    return state, tuple(events)


def _ordered(state: TurnState, order: Order) -> tuple[TurnState, tuple[Event, ...]]:
    at = state.heard
    if order == Order.COMMIT:
        events: tuple[Event, ...] = (Event(sign=Sign.TURN_END, at=at, speech_end=at),)
        if state.phase == Phase.SPEAK:
            events = (Event(sign=Sign.INTERRUPT, at=at), *events)
        elif state.phase == Phase.SPECULATE:
            events = (Event(sign=Sign.ROLLBACK, at=at, speech_end=state.speech_end), *events)
        return replace(state, phase=Phase.SPEAK, onset=None, run=0), events
    if order == Order.CLEAR:
        if state.phase not in (Phase.LISTEN, Phase.SPECULATE):
            return replace(state, onset=None, run=0), ()
        events = ()
        if state.phase == Phase.SPECULATE:
            events = (Event(sign=Sign.ROLLBACK, at=at, speech_end=state.speech_end),)
        return replace(state, phase=Phase.IDLE, onset=None, run=0), events
    if order == Order.SPEAK:
        return (replace(state, phase=Phase.SPEAK) if state.phase == Phase.IDLE else state), ()
    if state.phase != Phase.SPEAK:
        return state, ()
    # What the user has begun to say while the last of the answer sounded counts towards the next turn.
    return replace(state, phase=Phase.IDLE), (Event(sign=Sign.DONE, at=at),)


def rows_heard(pieces: Sequence[str], heard_rows: int) -> int:
    """How many rows of an interrupted answer stay in the history: up to the last punctuation that was heard.

    Args:
        pieces: Text that each generated row added (empty for rows of sound alone).
        heard_rows: Rows whose sound was played (60 ms each).
    Returns:
        Rows to keep, 0 where no punctuation was heard.

    Source: docs/networks.md section 8, t5: truncation at the nearest natural breakpoint.
    """
    keep = 0
    for row, piece in enumerate(pieces[:heard_rows]):
        if piece.rstrip(" ") and piece.rstrip(" ")[-1] in BREAKPOINTS:
            keep = row + 1
    return keep
