"""Which frames of a camera are looked at: dense in a turn, sparse between, history first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from omni_ray.inference.frame_sampling import MOST_SPARSE, Pair, SamplerState, begin_turn, end_turn, look


def film(state: SamplerState[int], times_ms: list[int]) -> tuple[SamplerState[int], list[Pair[int]]]:
    pairs: list[Pair[int]] = []
    for time_ms in times_ms:
        state, found = look(state, time_ms, time_ms)
        pairs += found
    return state, pairs


def test_a_turn_looks_twice_a_second_and_pairs_them() -> None:
    state, history = begin_turn(SamplerState[int]())
    assert history == ()
    state, pairs = film(state, list(range(0, 3000, 100)))
    assert pairs == [Pair(time_ms=t, frames=(t, t + 500)) for t in (0, 1000, 2000)]
    _, closing = end_turn(film(state, [3000])[0])
    assert closing == (Pair(time_ms=3000, frames=(3000, 3000)),)


def test_while_the_assistant_speaks_one_frame_in_two_seconds_is_kept_for_the_next_turn() -> None:
    """The example of networks.md: an answer of 4 s from second 3 leaves frames 3 and 5."""
    state, _ = end_turn(begin_turn(SamplerState[int]())[0])
    state, pairs = film(state, list(range(3000, 7000, 250)))
    assert pairs == []
    state, history = begin_turn(state)
    assert history == tuple(Pair(time_ms=t, frames=(t, t)) for t in (3000, 5000))
    assert film(state, [7000, 7500])[1] == [Pair(time_ms=7000, frames=(7000, 7500))]


def test_a_camera_that_trembles_or_runs_backwards_does_no_harm() -> None:
    state, _ = begin_turn(SamplerState[int]())
    _, pairs = film(state, [0, 480, 980, 1490, 1480, 100])
    assert [pair.time_ms for pair in pairs] == [0, 980]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=400), st.booleans())
def test_never_more_than_the_rate(steps: list[int], dense: bool) -> None:
    times, now = [], 0
    for step in steps:
        now += step
        times.append(now)
    state: SamplerState[int] = begin_turn(SamplerState[int]())[0] if dense else SamplerState()
    state, pairs = film(state, times)
    taken = 2 * len(pairs) if dense else len(state.sparse)
    assert taken <= now / (450 if dense else 1800) + 1
    assert len(state.sparse) <= MOST_SPARSE
