"""A side of a ratio in its own process: it works there, and whatever becomes of it is told."""

from __future__ import annotations

import os

import pytest

from omni_ray.types.errors import OmniError
from pipelines.bench.own_process import OwnProcess, Side

COUNTED = [0]


def side(what: str) -> Side:
    """Tells its process; each run gives its number, or fails, or ends the process, as asked."""
    if what == "not made":
        raise FileNotFoundError("there is no such model")

    def once() -> float:
        COUNTED[0] += 1
        if what == "fails":
            raise ValueError("the step failed")
        if what == "dies":
            os._exit(7)
        return float(COUNTED[0])

    return os.getpid(), once


def test_a_side_works_in_its_process_and_ends_with_the_block() -> None:
    with OwnProcess(side, "good") as run:
        assert run.told != os.getpid()
        assert [run(), run(), run()] == [1, 2, 3]
        process = run._process
    assert COUNTED == [0]
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("not made", "a side failed in its process:.*FileNotFoundError: there is no such model"),
        ("fails", "a side failed in its process:.*ValueError: the step failed"),
        ("dies", "a side's process ended with code 7"),
    ],
)
def test_what_becomes_of_it_is_told(what: str, words: str) -> None:
    with pytest.raises(OmniError, match=f"(?s){words}"), OwnProcess(side, what) as run:
        run()


def test_a_run_after_the_end_is_refused() -> None:
    with OwnProcess(side, "fails") as run:
        for words in ("the step failed", "ended with code 0"):
            with pytest.raises(OmniError, match=words):
                run()
