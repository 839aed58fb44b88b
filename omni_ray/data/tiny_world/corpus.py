"""What is asked and told in the tiny world, in words."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, all_words

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "digit": ("which digit is it", "what number is this"),
    "colour": ("which colour is it", "what colour is this"),
    "both": ("what is it", "what do you see"),
    "direction": ("which way does it move", "where does it go"),
    "all": ("what happens",),
}
"""Wordings of each question about one digit; ``both`` asks for colour and digit, ``all`` for the direction as well."""
HEAR = "what do you hear"
"""Asks for the words of a sound."""
SAY = ("say {}", "please say {}", "can you say {}")
"""Ask for speech."""
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}
MOST_FOLLOWED = len(DIGITS) - 1


def answer(question: str, colour: str, digit: int, direction: str = "") -> str:
    """The short answer to a question of :data:`QUESTIONS` about one digit."""
    words = {
        "digit": DIGITS[digit],
        "colour": colour,
        "both": f"{colour} {DIGITS[digit]}",
        "direction": direction,
        "all": f"{colour} {DIGITS[digit]} {direction}",
    }
    return words[question]


@functools.cache
def knowledge() -> tuple[tuple[str, str], ...]:
    """Questions about the world's words themselves, with answers, in a fixed order."""
    after = [(f"which number comes after {DIGITS[i]}", DIGITS[i + 1]) for i in range(MOST_FOLLOWED)]
    before = [(f"which number comes before {DIGITS[i + 1]}", DIGITS[i]) for i in range(MOST_FOLLOWED)]
    return (*after, *before, *((f"what is the opposite of {a}", b) for a, b in OPPOSITES.items()))


@functools.cache
def glosses() -> tuple[str, ...]:
    """What the nouns mean, as running text."""
    kinds = [f"{word} is a colour" for word in COLOURS] + [f"{word} is a digit" for word in DIGITS]
    kinds += [f"{word} is a direction" for word in DIRECTIONS]
    order = [f"{DIGITS[i + 1]} comes after {DIGITS[i]}" for i in range(MOST_FOLLOWED)]
    opposite = [f"{a} is the opposite of {b}" for a, b in OPPOSITES.items()]
    counting = ["zero one two three four", "five six seven eight nine", "red green blue yellow orange purple"]
    return (*kinds, *order, *opposite, *counting)


def statements(colour: str, digit: int, direction: str) -> tuple[str, ...]:
    """Ways to tell of one moving digit."""
    word, a = DIGITS[digit], "an" if colour[0] in "aeiou" else "a"
    return (
        f"{a} {colour} {word}",
        f"the {word} is {colour}",
        f"{a} {colour} {word} moves {direction}",
        f"the {colour} {word} goes {direction}",
        f"it is {a} {colour} {word} and it moves {direction}",
    )


def template_texts() -> Iterator[str]:
    """All words of the world inside its templates: what the tokenizer learns from; no combination is told."""
    roles = "USER:\nASSISTANT:\nVOICE ASSISTANT:\nSYSTEM:\n"
    words = " ".join(all_words())
    yield from (roles, words, *(f"{word}\n {word}" for word in all_words()))
    yield from (HEAR, *SAY, *glosses())
    for question, _ in knowledge():
        yield question
    for wordings in QUESTIONS.values():
        yield from wordings
    yield "an a the it is and moves goes first second third picture was in how many digits are there"
    yield "what was said while it moved"
    yield "USER : ASSISTANT VOICE SYSTEM , . ? !"
    yield from (f"second{{{s}.{tenth}}}:" for s in range(20) for tenth in (0, 5))
