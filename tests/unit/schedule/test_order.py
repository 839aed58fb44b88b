"""Schedules: every call once, in an order that a first-in-first-out actor can run, memory bounded by the window."""

from __future__ import annotations

import pytest

from omni_ray.schedule.order import Call, Kind, call_order


def test_barrier_waits_between_phases() -> None:
    kinds = [call.kind for call in call_order("barrier", [0, 1], 4)]
    e, l, b, w = Kind.ENCODE, Kind.LANGUAGE, Kind.ENCODER_BACKWARD, Kind.BARRIER
    assert kinds == [e, e, w, l, l, w, b, b, w]


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_pipelined_runs_everything_once_and_never_deadlocks(count: int, window: int) -> None:
    calls = call_order("pipelined", list(range(count)), window)
    for kind in (Kind.ENCODE, Kind.LANGUAGE, Kind.ENCODER_BACKWARD):
        assert [call.micro_batch for call in calls if call.kind == kind] == list(range(count))
    assert run_fifo(calls) == len(calls)


@pytest.mark.parametrize("window", [1, 3, 4])
def test_window_bounds_features_alive(window: int) -> None:
    alive = most = 0
    for call in call_order("pipelined", list(range(20)), window):
        alive += {Kind.ENCODE: 1, Kind.LANGUAGE: 0, Kind.ENCODER_BACKWARD: -1}[call.kind]
        most = max(most, alive)
    assert most == window + 1


def run_fifo(calls: list[Call]) -> int:
    """Run calls on two actors that each take the head of their own queue; returns how many could run."""
    encoder = [call for call in calls if call.kind in (Kind.ENCODE, Kind.ENCODER_BACKWARD)]
    language = [call for call in calls if call.kind == Kind.LANGUAGE]
    done: set[tuple[Kind, int]] = set()
    moved = True
    while moved:
        moved = False
        for queue in (encoder, language):
            if not queue:
                continue
            head = queue[0]
            needs = {Kind.LANGUAGE: Kind.ENCODE, Kind.ENCODER_BACKWARD: Kind.LANGUAGE}.get(head.kind)
            if needs is None or (needs, head.micro_batch) in done:
                done.add((head.kind, head.micro_batch))
                queue.pop(0)
                moved = True
    return len(done)
