"""The progress line tells rate and time left, and keeps quiet off a terminal."""

from __future__ import annotations

import io

import pytest

from omni_ray.observability.progress import Progress, format_duration


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_rate_and_time_left_do_not_count_what_was_done_before() -> None:
    clock = Clock()
    progress = Progress("S1", 110, done=50, stream=io.StringIO(), clock=clock)
    assert progress.left_s == float("inf")
    for _ in range(10):
        clock.now_s += 0.5
        progress.advance()
    assert progress.rate_per_s == 2.0
    assert progress.left_s == 25.0


def test_line_on_a_terminal() -> None:
    clock, stream = Clock(), Terminal()
    with Progress("S1", 2, stream=stream, clock=clock) as progress:
        clock.now_s += 1
        progress.advance(text=1.23456)
        clock.now_s += 1
        progress.advance(text=0.5)
    assert stream.getvalue() == (
        "\rS1 1/2 steps 1.00/s, 1 s left text=1.235"
        "\rS1 2/2 steps 1.00/s, 0 s left text=0.500"
        "\rS1 2/2 steps 1.00/s, 0 s left text=0.500\n"
    )


def test_quiet_when_not_a_terminal() -> None:
    stream = io.StringIO()
    with Progress("S1", 2, stream=stream) as progress:
        progress.advance()
        progress.advance()
    assert stream.getvalue() == ""
