"""What the tiny codec learns from: the assistant's voice above all, many synthetic voices, and people's digits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_ray.data.tiny_world.clips import level
from omni_ray.data.tiny_world.speech import (
    ASSISTANT_VOICE,
    HELD_OUT_VOICES,
    TRAIN_VOICES,
    Voice,
    load_human_digits,
    speak,
    trim,
)
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, all_words, is_held_out, pairs, phrase, triples
from omni_ray.models.resample import resample

INPUT_RATE_HZ, OUTPUT_RATE_HZ = 16000, 24000

SENTENCES: tuple[str, ...] = (
    "which digit is it",
    "which digit do you see",
    "which digit do you hear",
    "what colour is it",
    "what colour is the digit",
    "which way does it move",
    "what do you hear",
    "what do you see",
    "what did you hear",
    "what is in the picture",
    "which digit was in the first picture",
    "what colour was the second digit",
    "what was said while the digit moved",
    "how many digits are there",
    "say the digit and the colour",
    "repeat the words",
    "yes it is",
    "no it is not",
    "hello",
    "thank you",
)
CARRIERS: tuple[str, ...] = ("it is a {}", "the digit is {}", "i see a {}", "i hear {}", "a {}", "say {}", "the {}")
LOOSE_WORDS: tuple[str, ...] = (
    "the",
    "a",
    "it",
    "is",
    "was",
    "and",
    "in",
    "of",
    "to",
    "on",
    "what",
    "which",
    "how",
    "many",
    "there",
    "first",
    "second",
    "last",
    "before",
    "after",
    "picture",
    "video",
    "sound",
    "digit",
    "colour",
    "number",
    "moves",
    "moved",
    "moving",
    "hear",
    "see",
    "say",
    "said",
    "yes",
    "no",
    "not",
    "then",
    "while",
    "you",
    "i",
)
"""Words around the world's own, for loose rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One recording at both rates of the codec."""

    id: str
    """Unique name."""
    kind: str
    """``assistant``, ``synthetic`` or ``human``."""
    source: str
    """Voice or speaker."""
    words: tuple[str, ...]
    """What is said."""
    input_S: Tensor
    """[S] float32 at 16 kHz: what is coded."""
    output_S: Tensor
    """[S] float32 at 24 kHz: what is to come back."""


def assistant_texts(seed: int, loose: int = 240) -> list[str]:
    """What the assistant says in training: words, pairs and triples of the training split, questions, loose rows.

    No text holds a held-out colour and digit next to each other.
    """
    chance = random.Random(seed)
    seen_pairs = [phrase(*pair) for pair in pairs(held_out=False)]
    texts = [*all_words(), *SENTENCES, *seen_pairs]
    texts += [f"{phrase(colour, digit)} {way}" for colour, digit, way in triples(held_out=False)][::2]
    texts += [carrier.format(text) for i, text in enumerate(seen_pairs) for carrier in (CARRIERS[i % len(CARRIERS)],)]
    texts += [carrier.format(word) for carrier in CARRIERS[1:] for word in DIGITS]
    texts += [f"it moves {way}" for way in DIRECTIONS]
    pool = (*COLOURS, *DIGITS, *DIRECTIONS, *LOOSE_WORDS)
    while loose:
        words = chance.choices(pool, k=chance.randint(2, 6))
        if not any(_forbidden(*neighbours) for neighbours in pairwise(words)):
            texts.append(" ".join(words))
            loose -= 1
    return list(dict.fromkeys(texts))


def _forbidden(first: str, second: str) -> bool:
    return first in COLOURS and second in DIGITS and is_held_out(first, second)


def training_clips(real_data: Path | None, *, seed: int, hold_out: str = "yweweler") -> list[Clip]:
    """All training speech in a fixed order.

    Raises:
        DataError: a speech package is missing, recordings are damaged, or nobody is called ``hold_out``.
    """
    chance = random.Random(seed + 1)
    clips = [_spoken(text, ASSISTANT_VOICE, "assistant") for text in assistant_texts(seed)]
    longer = [*SENTENCES, *(phrase(*pair) for pair in pairs(held_out=False))]
    for voice in TRAIN_VOICES:
        texts = [*chance.sample(all_words(), 6), *chance.sample(longer, 6)]
        clips += [_spoken(text, voice, "synthetic") for text in texts]
    for person in load_human_digits(real_data, hold_out).train:
        clips.append(_clip(person.wave, person.rate, person.id, "human", person.speaker, DIGITS[person.digit]))
    return clips


def held_out_clips(real_data: Path | None, *, hold_out: str = "yweweler") -> dict[str, list[Clip]]:
    """Speech of the figures: unseen pairs (alone, in a carrier, with a direction), unseen voices, an unseen person."""
    unseen = [phrase(*pair) for pair in pairs(held_out=True)]
    people = load_human_digits(real_data, hold_out).held_out
    return {
        "assistant_pairs": [_spoken(text, ASSISTANT_VOICE, "assistant") for text in unseen],
        "assistant_carried": [
            _spoken(carrier.format(text), ASSISTANT_VOICE, "assistant")
            for i, text in enumerate(unseen)
            for carrier in (CARRIERS[i % 4 if i % 4 != 1 else 2], CARRIERS[4 + i % 3])
        ],
        "assistant_triples": [
            _spoken(f"{phrase(colour, digit)} {way}", ASSISTANT_VOICE, "assistant")
            for colour, digit, way in triples(held_out=True)
        ],
        "synthetic_pairs": [
            _spoken(unseen[(i + shift) % len(unseen)], voice, "synthetic")
            for i, voice in enumerate(HELD_OUT_VOICES)
            for shift in (0, 4, 8)
        ],
        "human_digits": [
            _clip(u.wave, u.rate, u.id, "human", u.speaker, DIGITS[u.digit]) for u in people if u.take % 5 == 0
        ],
    }


def digest(clips: Iterable[Clip]) -> str:
    """sha256 over ids and 16-bit samples."""
    whole = hashlib.sha256()
    for clip in clips:
        whole.update(clip.id.encode())
        whole.update((clip.output_S * 32767).round().clamp(-32768, 32767).to(torch.int16).numpy().tobytes())
    return whole.hexdigest()


def by_kind(clips: Sequence[Clip]) -> dict[str, list[int]]:
    """Places of the clips of each kind."""
    kinds: dict[str, list[int]] = {}
    for place, clip in enumerate(clips):
        kinds.setdefault(clip.kind, []).append(place)
    return kinds


def _spoken(text: str, voice: Voice, kind: str) -> Clip:
    wave, rate = speak(text, voice)
    wave = level(trim(wave, rate))  # as the world's clips are: cut to the sound, one peak
    return _clip(wave, rate, f"{voice.engine}/{voice.name}/{text.replace(' ', '-')}", kind, voice.name, text)


def _clip(wave: np.ndarray, rate: int, name: str, kind: str, source: str, text: str) -> Clip:
    wave_S = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)).clamp(-1.0, 1.0)
    return Clip(
        id=name,
        kind=kind,
        source=source,
        words=tuple(text.split()),
        input_S=resample(wave_S, rate, INPUT_RATE_HZ),
        output_S=resample(wave_S, rate, OUTPUT_RATE_HZ),
    )
