"""Samples with sound: heard through the audio encoder, and codec rows in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from omni_ray.data.tiny_world import corpus
from omni_ray.data.tiny_world.clips import human_flac, own_facts, own_phrases, own_says
from omni_ray.data.tiny_world.speech import ASSISTANT_VOICE, Voice
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, all_words, is_held_out, phrase
from omni_ray.data.tiny_world.world import (
    Album,
    Draft,
    World,
    assistant,
    kinds_by_share,
    part,
    pick,
    text,
    user,
    voice,
)

_SPEECH_SHARES = {"say": 0.55, "tell": 0.15, "hear": 0.30}
_PHRASE_SHARE, _WORD_SHARE = 0.6, 0.2
"""Of what is to be said: phrases of the training pairs, single words; the rest are loose rows of words."""
_ABOUT_STILL = ("digit", "colour", "both")


def speech_text_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Codec speech beside text: say a phrase, tell a fact aloud, write what codec speech says.

    The held-out split asks for unseen combinations only, each prompt once, and has their phrases for the codec.
    """
    if world.held_out:
        yield from _spoken_unseen(world, count)
        return
    for kind in kinds_by_share(rng, _SPEECH_SHARES, count):
        colour, digit = world.pairs[int(rng.integers(len(world.pairs)))]
        if kind == "hear":
            yield _codec_heard(world, rng)
        elif kind == "say":
            words = _to_say(rng, colour, digit)
            yield spoken(world, "speech_say", (text(pick(rng, corpus.SAY).format(words)),), words)
        else:
            question = pick(rng, _ABOUT_STILL)
            told = corpus.statements(colour, digit, pick(rng, tuple(DIRECTIONS)))
            asked = f"{pick(rng, told)}\n{pick(rng, corpus.QUESTIONS[question])}"
            yield spoken(world, "speech_tell", (text(asked),), corpus.answer(question, colour, digit))


def _to_say(rng: np.random.Generator, colour: str, digit: int) -> str:
    """A phrase, one word, or a loose row of two or three words, so that the order of words is heard from the prompt."""
    kind = rng.random()
    if kind < _PHRASE_SHARE:
        return phrase(colour, digit)
    if kind < _PHRASE_SHARE + _WORD_SHARE:
        return pick(rng, all_words())
    while True:
        row = [pick(rng, all_words()) for _ in range(int(rng.integers(2, 4)))]
        if not any(is_held_out(c, d) for c in row if c in COLOURS for d in row if d in DIGITS):
            return " ".join(row)


def _spoken_unseen(world: World, count: int) -> Iterator[Draft]:
    for pair in world.pairs[:count]:
        yield _hear(world, ASSISTANT_VOICE, phrase(*pair), "codec_phrase")
    prompts = []
    for colour, digit in world.pairs:
        words = phrase(colour, digit)
        told = [way for direction in DIRECTIONS for way in corpus.statements(colour, digit, direction)]
        asks = [f"{way}\n{wording}" for wording in corpus.QUESTIONS["both"] for way in dict.fromkeys(told)]
        prompts.append([(words, *pair) for pair in [("speech_say", s.format(words)) for s in corpus.SAY]])
        prompts[-1] += [(words, "speech_tell", asked) for asked in asks]
    # Round by round over the pairs, so that any count is spread over all of them.
    rounds = [row[i] for i in range(max(map(len, prompts))) for row in prompts if i < len(row)]
    for words, kind, asked in rounds[: max(0, count - len(world.pairs))]:
        yield spoken(world, kind, (text(asked),), words, {"task": "spoken_answer"})


def _codec_heard(world: World, rng: np.random.Generator) -> Draft:
    """Codec speech of the user, mostly of many voices, to be written down."""
    speaker = ASSISTANT_VOICE if rng.random() < 0.4 else _speaker(world, rng)
    phrases = tuple(phrase(*pair) for pair in world.pairs) if speaker == ASSISTANT_VOICE else own_phrases(speaker)
    words = pick(rng, phrases) if rng.random() < 0.5 else pick(rng, all_words())
    return _hear(world, speaker, words, "speech_hear")


def _hear(world: World, speaker: Voice, words: str, task: str) -> Draft:
    return Draft(
        kind="speech_hear",
        messages=(user(part("speech", "heard.flac"), text(corpus.HEAR)), assistant(words)),
        media={"heard.flac": world.clips.flac(speaker, words)},
        facts={"task": task, "answer": words, "voice": speaker.name},
    )


def picture_speech_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """A written question about a picture, answered aloud."""
    album = Album(world, rng)
    for _ in range(count):
        seen = album.picture()
        question = pick(rng, _ABOUT_STILL)
        asked = (part("image", "image.png"), text(pick(rng, corpus.QUESTIONS[question])))
        facts = {"task": f"picture_speech_{question}", **seen.facts}
        answer = corpus.answer(question, seen.colour, seen.digit)
        yield spoken(world, "picture_speech", asked, answer, facts, {"image.png": seen.png})


def audio_human_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """People's digits, each recording once (as many as there are, whatever the count)."""
    for place in rng.permutation(len(world.people)):
        utterance = world.people[int(place)]
        words = DIGITS[utterance.digit]
        facts = {"task": "audio_human", "answer": words, "speaker": utterance.speaker, "recording": utterance.id}
        yield _written_down("audio_human", human_flac(utterance), words, facts)


def audio_synthetic_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Many voices' words: every voice's ten digits (the held-out split has no others), then words and phrases."""
    digits = [(speaker, word) for word in DIGITS for speaker in world.voices]
    others = [(s, w) for s in world.voices for w in (*COLOURS, *DIRECTIONS, *own_phrases(s))]
    listed = [digits[int(i)] for i in rng.permutation(len(digits))]
    listed += [] if world.held_out else [others[int(i)] for i in rng.permutation(len(others))]
    for speaker, words in listed[:count]:
        facts = {"task": "audio_synthetic", "answer": words, "voice": speaker.name}
        yield _written_down("audio_synthetic", world.clips.flac(speaker, words), words, facts)


def audio_repeat_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Spoken questions to be written down, not answered."""
    wordings = [wording for kinds in corpus.QUESTIONS.values() for wording in kinds]
    listed = [(s, w) for s in world.voices for w in (*wordings, *own_facts(s))]
    for place in rng.permutation(len(listed))[:count]:
        speaker, words = listed[int(place)]
        facts = {"task": "audio_repeat", "answer": words, "voice": speaker.name}
        yield _written_down("audio_repeat", world.clips.flac(speaker, words), words, facts)


def cross_modal_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """A spoken question about a picture, answered in writing; two of three ask for both words."""
    album = Album(world, rng)
    for question in kinds_by_share(rng, {"both": 0.6, "digit": 0.2, "colour": 0.2}, count):
        seen, speaker = album.picture(), _speaker(world, rng)
        asked = pick(rng, corpus.QUESTIONS[question])
        answer = corpus.answer(question, seen.colour, seen.digit)
        yield Draft(
            kind="cross_modal",
            messages=(user(part("image", "image.png"), part("audio", "question.flac")), assistant(answer)),
            media={"image.png": seen.png, "question.flac": world.clips.flac(speaker, asked)},
            facts={"task": f"cross_modal_{question}", "answer": answer, "voice": speaker.name, **seen.facts},
        )


def cross_modal_speech_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """A spoken question about a picture, answered aloud."""
    album = Album(world, rng)
    for question in kinds_by_share(rng, {"both": 0.6, "digit": 0.2, "colour": 0.2}, count):
        seen, speaker = album.picture(), _speaker(world, rng)
        wording = pick(rng, corpus.QUESTIONS[question])
        media = {"image.png": seen.png, "question.flac": world.clips.flac(speaker, wording)}
        asked = (part("image", "image.png"), part("audio", "question.flac"))
        facts = {"task": f"cross_modal_speech_{question}", "voice": speaker.name, **seen.facts}
        answer = corpus.answer(question, seen.colour, seen.digit)
        yield spoken(world, "cross_modal_speech", asked, answer, facts, media)


def speech_dialogue_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Spoken questions about the world's words, and spoken requests to speak, answered aloud over one or two turns."""
    answers = dict(corpus.knowledge())
    for _ in range(count):
        speaker = _speaker(world, rng)
        turns: list[dict[str, Any]] = []
        media: dict[str, bytes] = {}
        words = ""
        for turn in range(int(rng.integers(1, 3))):
            asks = own_facts(speaker) if world.held_out or rng.random() < 0.6 else own_says(speaker)
            asked = pick(rng, asks)
            words = answers.get(asked, asked.removeprefix("say "))
            question, (reply, said) = f"question{turn}.flac", voice(words, f"answer{turn}")
            media |= {question: world.clips.flac(speaker, asked)} | _in_own_voice(world, said)
            turns += [user(part("audio", question)), reply]
        facts = {"task": "speech_dialogue", "answer": words, "voice": speaker.name, "aloud": True}
        yield Draft(kind="speech_dialogue", messages=tuple(turns), media=media, facts=facts)


def spoken(
    world: World,
    kind: str,
    asked: tuple[dict[str, Any], ...],
    words: str,
    facts: dict[str, Any] | None = None,
    media: dict[str, bytes] | None = None,
) -> Draft:
    """A question with an answer in the assistant's voice, word by word."""
    reply, said = voice(words, "answer")
    return Draft(
        kind=kind,
        messages=(user(*asked), reply),
        media={**(media or {}), **_in_own_voice(world, said)},
        facts={"task": kind, "answer": words, "aloud": True, **(facts or {})},
    )


def _in_own_voice(world: World, said: Mapping[str, str]) -> dict[str, bytes]:
    return {name: world.clips.flac(ASSISTANT_VOICE, word) for name, word in said.items()}


def _written_down(kind: str, flac: bytes, words: str, facts: dict[str, Any]) -> Draft:
    messages = (user(part("audio", "heard.flac"), text(corpus.HEAR)), assistant(words))
    return Draft(kind=kind, messages=messages, media={"heard.flac": flac}, facts=facts)


def _speaker(world: World, rng: np.random.Generator) -> Voice:
    return world.voices[int(rng.integers(len(world.voices)))]
