"""Intervals against published numbers, and what counts as reached."""

from __future__ import annotations

import pytest

from omni_ray.evaluation.metrics import TARGETS, plain_words, same_words, share, slots_right, target, wilson
from omni_ray.types.errors import ConfigError


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_equals_the_published_one(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_interval_of_all_right_mirrors_that_of_none() -> None:
    low, high = wilson(0, 12)
    assert wilson(12, 12) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("right", "n"), [(3, 2), (-1, 4), (0, 0)])
def test_refuses_what_is_no_share(right: int, n: int) -> None:
    with pytest.raises(ConfigError, match=f"{right} right among {n} is no share"):
        wilson(right, n)


def test_a_lucky_few_do_not_reach_the_goal() -> None:
    many = share("audio_human_accuracy", 60, 100)
    few = share("video_direction_accuracy", 1, 1)
    assert many.reached is True
    assert few.value == 1.0
    assert few.low < few.chance
    assert few.reached is False


def test_below_the_goal_is_not_reached() -> None:
    assert share("image_digit_accuracy", 79, 100).reached is False
    assert share("image_digit_accuracy", 80, 100).reached is True


def test_figures_without_a_goal_or_a_value_are_neither() -> None:
    assert share("dialogue_memory_accuracy", 5, 10).reached is None
    gone = share("audio_human_accuracy", 0, 0, left_out="no human speech")
    assert (gone.value, gone.reached, gone.left_out, gone.goal) == (None, None, "no human speech", 0.55)


def test_a_ratio_scales_value_and_interval() -> None:
    plain, ratio = share("codec_word_accuracy_ratio", 12, 24), share("codec_word_accuracy_ratio", 12, 24, scale=1.25)
    assert ratio.value == 0.625
    assert (ratio.low, ratio.high) == pytest.approx((plain.low * 1.25, plain.high * 1.25))


def test_every_target_is_there_once() -> None:
    names = [row.name for row in TARGETS]
    assert len(set(names)) == len(names) == 11
    assert {row.name for row in TARGETS if row.first is None} == {"spoken_answer_exact", "dialogue_memory_accuracy"}
    assert all(row.first is None or row.first > row.chance for row in TARGETS)
    with pytest.raises(ConfigError, match="no held-out target 'audio_accuracy'"):
        target("audio_accuracy")


def test_words_are_compared_without_case_and_points() -> None:
    assert plain_words(" Red  seven.\n") == ("red", "seven")
    assert same_words("Red seven.", "red seven")
    assert not same_words("seven red", "red seven")
    assert not same_words("red seven seven", "red seven")


@pytest.mark.parametrize(
    ("heard", "right"),
    [
        (("red", "seven"), (True, True)),
        (("blue", "seven"), (False, True)),
        (("seven", "red"), (False, False)),
        (("red",), (True, False)),
        ((), (False, False)),
    ],
)
def test_slots_count_words_at_their_place(heard: tuple[str, ...], right: tuple[bool, ...]) -> None:
    assert slots_right(("red", "seven"), heard) == right
