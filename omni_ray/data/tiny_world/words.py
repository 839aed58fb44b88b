"""The words of the tiny world, and which of their combinations training never sees."""

from __future__ import annotations

import functools
from collections.abc import Iterator

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 45),
    "green": (45, 190, 65),
    "blue": (60, 100, 245),
    "yellow": (240, 225, 55),
    "orange": (250, 140, 30),
    "purple": (165, 65, 215),
}
"""Six colours and the RGB a digit is painted with."""

DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Digit words; the index is the digit."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Four directions of motion as (x, y) steps of the picture plane, y downwards."""

_HELD_OUT_EVERY = 5


def is_held_out(colour: str, digit: int | str, direction: str | None = None) -> bool:
    """Whether a combination is kept out of every training sample, in every modality.

    The rule is arithmetic on the pair: (digit + 2 colour) mod 5 = 0 holds out 12 of the 60 colour-digit pairs, two of
    each colour and one or two of each digit. A triple with a direction is held out with its pair (48 of 240), so that
    an unseen moving digit has not been seen standing, spoken or written either.

    Raises:
        KeyError: a word that is not of this world.
    """
    colour_index = _index(tuple(COLOURS), colour)
    digit_index = _index(DIGITS, digit) if isinstance(digit, str) else int(digit)
    if not 0 <= digit_index < len(DIGITS):
        raise KeyError(digit)
    if direction is not None:
        _index(tuple(DIRECTIONS), direction)
    return (digit_index + 2 * colour_index) % _HELD_OUT_EVERY == 0


@functools.cache
def pairs(held_out: bool) -> tuple[tuple[str, int], ...]:
    """Colour-digit pairs of one split in a fixed order: 48 for training, 12 held out."""
    return tuple((c, d) for c in COLOURS for d in range(len(DIGITS)) if is_held_out(c, d) == held_out)


def phrase(colour: str, digit: int) -> str:
    """``red seven``: how a pair is written and spoken."""
    return f"{colour} {DIGITS[digit]}"


def all_words() -> tuple[str, ...]:
    """Every content word: colours, digits, directions."""
    return (*COLOURS, *DIGITS, *DIRECTIONS)


def triples(held_out: bool) -> Iterator[tuple[str, int, str]]:
    """Colour-digit-direction triples of one split in a fixed order."""
    for colour, digit in pairs(held_out):
        for direction in DIRECTIONS:
            yield colour, digit, direction


def _index(words: tuple[str, ...], word: str) -> int:
    if word not in words:
        raise KeyError(word)
    return words.index(word)
