"""Samples of words alone: statements, questions about them, and texts in the place of sounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from omni_ray.data.tiny_world import corpus
from omni_ray.data.tiny_world.clips import spoken_questions
from omni_ray.data.tiny_world.words import DIGITS, DIRECTIONS, all_words, phrase
from omni_ray.data.tiny_world.world import Draft, World, as_audio, assistant, kinds_by_share, pick, text, user

_SHARES = {"text": 0.15, "text_question": 0.30, "text_spoken_question": 0.25, "text_echo": 0.20, "text_two": 0.10}
_HELD_OUT_SHARES = {"text_question": 0.6, "text_spoken_question": 0.2, "text_echo": 0.1, "text_two": 0.1}
_ABOUT_STILL = ("digit", "colour", "both")
_KNOWLEDGE_SHARE = 0.2
_PLACES = ("first", "second")


def text_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Text of stage 0: what the questions mean before anything is seen or heard.

    Texts stand where pictures will stand, and between the audio marks where sounds will; so a frozen language model
    already says what a later sound asks for.
    """
    makers: dict[str, Callable[[World, np.random.Generator], Draft]] = {
        "text": _statement,
        "text_question": _question,
        "text_spoken_question": _spoken_question,
        "text_echo": _echo,
        "text_two": _two,
    }
    for kind in kinds_by_share(rng, _HELD_OUT_SHARES if world.held_out else _SHARES, count):
        yield makers[kind](world, rng)


def _pair(world: World, rng: np.random.Generator) -> tuple[str, int]:
    return world.pairs[int(rng.integers(len(world.pairs)))]


def _told(world: World, rng: np.random.Generator) -> tuple[str, str, str, dict[str, Any]]:
    """(statement, question name, answer, facts) about one digit of the split."""
    (colour, digit), direction = _pair(world, rng), pick(rng, tuple(DIRECTIONS))
    ways = corpus.statements(colour, digit, direction)
    place = int(rng.integers(len(ways)))
    question = pick(rng, _ABOUT_STILL if place < 2 else tuple(corpus.QUESTIONS))
    answer = corpus.answer(question, colour, digit, direction)
    facts = {"task": "text", "answer": answer, "question": question}
    return ways[place], question, answer, facts


def _statement(world: World, rng: np.random.Generator) -> Draft:
    (colour, digit), direction = _pair(world, rng), pick(rng, tuple(DIRECTIONS))
    told = (*corpus.statements(colour, digit, direction), *corpus.glosses())
    chosen = pick(rng, told[:5]) if rng.random() < 0.7 else pick(rng, told[5:])
    return Draft(kind="text", messages=({"role": "text", "content": [text(chosen)]},))


def _question(world: World, rng: np.random.Generator) -> Draft:
    if not world.held_out and rng.random() < _KNOWLEDGE_SHARE:
        asked, answer = corpus.knowledge()[int(rng.integers(len(corpus.knowledge())))]
        facts: dict[str, Any] = {"task": "text_knowledge", "answer": answer}
        return Draft(kind="text_question", messages=(user(text(asked)), assistant(answer)), facts=facts)
    told, question, answer, facts = _told(world, rng)
    asked = pick(rng, corpus.QUESTIONS[question])
    return Draft(kind="text_question", messages=(user(text(f"{told}\n{asked}")), assistant(answer)), facts=facts)


def _spoken_question(world: World, rng: np.random.Generator) -> Draft:
    """The question between the audio marks, as it will be heard."""
    if not world.held_out and rng.random() < _KNOWLEDGE_SHARE:
        asked, answer = corpus.knowledge()[int(rng.integers(len(corpus.knowledge())))]
        facts: dict[str, Any] = {"task": "text_knowledge", "answer": answer}
        return Draft(kind="text_spoken_question", messages=(user(as_audio(asked)), assistant(answer)), facts=facts)
    told, question, answer, facts = _told(world, rng)
    asked = pick(rng, corpus.QUESTIONS[question])
    messages = (user(text(f"{told}\n"), as_audio(asked)), assistant(answer))
    return Draft(kind="text_spoken_question", messages=messages, facts=facts)


def _echo(world: World, rng: np.random.Generator) -> Draft:
    """Words between the audio marks, to be said again."""
    roll = rng.random()
    if world.held_out or roll < 0.35:
        heard = phrase(*_pair(world, rng))
    elif roll < 0.65:
        heard = pick(rng, all_words())
    elif roll < 0.9:
        heard = pick(rng, spoken_questions())
    else:
        heard = corpus.knowledge()[int(rng.integers(len(corpus.knowledge())))][0]
    messages = (user(as_audio(heard), text(corpus.HEAR)), assistant(heard))
    return Draft(kind="text_echo", messages=messages, facts={"task": "text_echo", "answer": heard})


def _two(world: World, rng: np.random.Generator) -> Draft:
    """Two things told, one asked for: by place, or one word of it by the other."""
    first, second = _pair(world, rng), _pair(world, rng)
    while second[0] == first[0] or second[1] == first[1]:
        second = _pair(world, rng)
    place = int(rng.integers(2))
    colour, digit = (first, second)[place]
    asked, answer = (
        (f"which digit was {_PLACES[place]}", DIGITS[digit]),
        (f"which colour was {_PLACES[place]}", colour),
        (f"what was {_PLACES[place]}", phrase(colour, digit)),
        (f"which digit is {colour}", DIGITS[digit]),
        (f"which colour is the {DIGITS[digit]}", colour),
    )[int(rng.integers(5))]
    told = f"{phrase(*first)}\n{phrase(*second)}\n"
    messages = (user(text(told + asked)), assistant(answer))
    return Draft(kind="text_two", messages=messages, facts={"task": "text_two", "answer": answer})
