"""Which combinations training never sees."""

from __future__ import annotations

import pytest

from omni_ray.data.tiny_world.corpus import statements
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, is_held_out, pairs, phrase, triples


def test_a_fifth_of_the_combinations_is_held_out() -> None:
    assert (len(pairs(True)), len(pairs(False))) == (12, 48)
    assert (len(list(triples(True))), len(list(triples(False)))) == (48, 192)


def test_every_word_stays_in_training_and_is_judged() -> None:
    for held_out in (False, True):
        assert {colour for colour, _ in pairs(held_out)} == set(COLOURS)
        assert {digit for _, digit in pairs(held_out)} == set(range(10))


def test_a_triple_goes_with_its_pair() -> None:
    for colour, digit in pairs(True):
        assert all(is_held_out(colour, DIGITS[digit], direction) for direction in DIRECTIONS)


def test_words_of_another_world_are_refused() -> None:
    for wrong in (("pink", 1, None), ("red", 10, None), ("red", "ten", None), ("red", 1, "back")):
        with pytest.raises(KeyError):
            is_held_out(*wrong)


def test_statements_say_colour_digit_and_direction() -> None:
    told = statements("orange", 7, "left")
    assert told[0] == "an orange seven"
    assert phrase("orange", 7) == "orange seven"
    assert sum("left" in way for way in told) == 3
