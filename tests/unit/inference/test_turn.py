"""The turn machine over recorded and drawn traces: order, dates, and the same events for any cut of time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_ray.config.serving import TurnConfig
from omni_ray.inference.turn import (
    Event,
    Heard,
    Order,
    Phase,
    Sign,
    Signal,
    TurnState,
    Window,
    advance,
    rows_heard,
    run_trace,
)

CONFIG = TurnConfig()
MS = 16
STEP = 512


def trace(pattern: str) -> list[Signal]:
    """One character a window: # speech, - a soft sound (0.4), . silence; ! the answer was heard, C commit, X clear,
    A an answer that the client asked for leaves."""
    signals: list[Signal] = []
    place = 0
    for sign in pattern:
        if sign in "!CXA":
            signals.append({"!": Order.SPOKEN, "C": Order.COMMIT, "X": Order.CLEAR, "A": Order.SPEAK}[sign])
            continue
        probability = {"#": 0.9, "-": 0.4, ".": 0.02}[sign]
        signals.append(Window(probability=probability, start=place, end=place + STEP))
        place += STEP
    return signals


def signs(pattern: str, config: TurnConfig = CONFIG) -> list[str]:
    return [event.sign.value for event in run_trace(trace(pattern), config)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("......", []),
        (".#.#..#.", []),  # clicks
        ("..####", ["turn_start"]),
        ("####" + "." * 7, ["turn_start"]),
        ("####" + "." * 8, ["turn_start", "speculate"]),
        ("####" + "." * 18, ["turn_start", "speculate"]),
        ("####" + "." * 19, ["turn_start", "speculate", "turn_end"]),
        ("####" + "." * 10 + "#", ["turn_start", "speculate", "rollback"]),
        ("####" + "." * 10 + "-" + "." * 9, ["turn_start", "speculate", "turn_end"]),  # a soft sound does not go on
        ("####" + "-" * 30, ["turn_start"]),  # inside speech it does
        ("..A" + "#" * 12, ["interrupt", "turn_start"]),
        ("..A..!..####", ["done", "turn_start"]),
        ("####A" + "." * 19, ["turn_start", "speculate", "turn_end"]),  # the user is speaking already
        ("####" + "." * 10 + "#" + "." * 19, ["turn_start", "speculate", "rollback", "speculate", "turn_end"]),
        ("####" + "." * 19 + "##.", ["turn_start", "speculate", "turn_end"]),  # shorter than a barge-in
        ("####" + "." * 19 + "###", ["turn_start", "speculate", "turn_end", "interrupt", "turn_start"]),
        ("####" + "." * 19 + "!..##", ["turn_start", "speculate", "turn_end", "done", "turn_start"]),
        ("####C", ["turn_start", "turn_end"]),
        ("..C!", ["turn_end", "done"]),
        ("####" + "." * 9 + "C", ["turn_start", "speculate", "rollback", "turn_end"]),
        ("..C..C", ["turn_end", "interrupt", "turn_end"]),
        ("####" + "." * 9 + "X...", ["turn_start", "speculate", "rollback"]),
        ("####X" + "." * 30, ["turn_start"]),
        ("!X", []),
    ],
)
def test_traces(pattern: str, expected: list[str]) -> None:
    assert signs(pattern) == expected


def test_dates_are_those_of_the_sound() -> None:
    start, speculate, end = run_trace(trace("." * 20 + "####" + "." * 30), CONFIG)
    speech_end = 24 * STEP
    assert start == Event(sign=Sign.TURN_START, at=20 * STEP - 300 * MS)
    assert speculate == Event(sign=Sign.SPECULATE, at=speech_end + 250 * MS, speech_end=speech_end)
    assert end == Event(sign=Sign.TURN_END, at=speech_end + 600 * MS, speech_end=speech_end)


def test_a_deadline_is_kept_to_the_sample() -> None:
    """The end of the turn does not wait for the detector's window."""
    state = TurnState()
    for signal in trace("####" + "." * 18):
        state, _ = advance(state, signal, CONFIG)
    due = 4 * STEP + 600 * MS
    state, events = advance(state, Heard(until=due - 1), CONFIG)
    assert events == ()
    _, events = advance(state, Heard(until=due), CONFIG)
    assert [event.sign for event in events] == [Sign.TURN_END]


def test_an_endless_turn_is_ended() -> None:
    config = TurnConfig(max_turn_s=1.0)
    assert signs("#" * 40, config) == ["turn_start", "turn_end", "interrupt", "turn_start"]


def test_no_speculation_where_both_silences_are_equal() -> None:
    assert signs("####" + "." * 19, TurnConfig(speculate_ms=600)) == ["turn_start", "turn_end"]
    with pytest.raises(ValueError, match=r"turn.speculate_ms is 700, after the end of the turn at silence_ms 600"):
        TurnConfig(speculate_ms=700)


@settings(max_examples=300, deadline=None)
@given(st.text("##--....!CX", max_size=120))
def test_signs_come_in_a_lawful_order(pattern: str) -> None:
    """No end without a turn, no rollback without speculation, dates never run backwards past the prefix."""
    state, speculating = TurnState(), False
    for signal in trace(pattern):
        before = state.phase
        state, events = advance(state, signal, CONFIG)
        for event in events:
            if event.sign == Sign.SPECULATE:
                assert not speculating
                speculating = True
            elif event.sign == Sign.ROLLBACK:
                assert speculating
                speculating = False
            elif event.sign == Sign.TURN_END:
                speculating = False
                assert event.at <= state.heard
            elif event.sign == Sign.INTERRUPT:
                assert before == Phase.SPEAK
        assert speculating == (state.phase == Phase.SPECULATE)
        assert (state.phase == Phase.SPEAK) or not any(e.sign == Sign.TURN_END for e in events)


@settings(max_examples=100, deadline=None)
@given(st.text("#-..", max_size=60), st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_time_may_be_cut_anywhere(pattern: str, cuts: list[int]) -> None:
    """Deadlines between windows change when an event is known, never which events there are, nor their dates.

    The one freedom: a deadline inside a window whose speech is known only at its end.
    """
    signals = trace(pattern)
    mixed: list[Signal] = []
    for number, signal in enumerate(signals):
        mixed.append(signal)
        assert isinstance(signal, Window)
        quiet = number + 1 < len(signals) and signals[number + 1].probability < CONFIG.threshold - CONFIG.release  # type: ignore[union-attr]
        if quiet:
            mixed += [Heard(until=signal.end + min(cut, STEP)) for cut in cuts]
    assert run_trace(mixed, CONFIG) == run_trace(signals, CONFIG)


def test_history_ends_at_the_last_punctuation_heard() -> None:
    pieces = ["It", " is", " red", ".", "", " And", " blue", "!", ""]
    assert [rows_heard(pieces, heard) for heard in range(10)] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert rows_heard(["no", " end"], 2) == 0
    assert rows_heard(["\u597d\u3002", "x"], 2) == 1
    assert rows_heard([], 5) == 0
