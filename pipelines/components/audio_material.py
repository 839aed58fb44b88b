"""What the tiny audio encoder learns from: people's digits, and words and sentences in many synthetic voices."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_ray.data.audio import Wave, resample
from omni_ray.data.tiny_world.clips import CLIP_RATE_HZ, ClipBook, lists_of, spoken_questions
from omni_ray.data.tiny_world.corpus import knowledge
from omni_ray.data.tiny_world.speech import (
    ASSISTANT_VOICE,
    HELD_OUT_VOICES,
    TRAIN_VOICES,
    Utterance,
    Voice,
    load_human_digits,
)
from omni_ray.data.tiny_world.words import DIGITS, all_words, pairs, phrase


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One recording and the words in it."""

    wave_S: Tensor
    """[S] float32 at 16 kHz, -1..1."""
    words: tuple[str, ...]
    """What is said."""
    kind: str
    """``human`` (a person's digit), ``word`` (synthetic) or ``sentence`` (synthetic, several words)."""
    source: str
    """Speaker or voice."""
    id: str
    """Unique name."""


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """CTC units: the blank (id 0), then content words and all other spoken words in a fixed order."""
    asked = [*spoken_questions(), *(question for question, _ in knowledge()), "say"]
    return ("<blank>", *dict.fromkeys((*all_words(), *(word for text in asked for word in text.split()))))


def training_clips(real_data: Path | None, hold_out: str = "yweweler", also_out: Sequence[str] = ()) -> list[Clip]:
    """All training material in a fixed order; colour-digit pairs only from the training split.

    Args:
        real_data: Folder with ``human-digits``; None or a folder without it trains on synthetic voices alone.
        hold_out: Speaker kept for the figures.
        also_out: Further speakers left out, for choosing a recipe without looking at ``hold_out``.

    Raises:
        DataError: a speech package is missing, the recordings are damaged, or nobody is called ``hold_out``.
    """
    people = [u for u in load_human_digits(real_data, hold_out).train if u.speaker not in also_out]
    book = ClipBook()
    clips = [_human(utterance) for utterance in people]
    for voice in TRAIN_VOICES:
        # The same speaker twice, the second time higher or lower and in more of a hurry.
        hurried = replace(voice, words_per_minute=voice.words_per_minute + 25, pitch=(voice.pitch + 35) % 100)
        for said in (voice, hurried):
            clips += _say_all(book, said, [text for texts in lists_of(said) for text in texts])
    # The assistant's voice is part of the world: the model will hear itself.
    own = (*all_words(), *(phrase(*pair) for pair in pairs(held_out=False)))
    return clips + list(_say_all(book, ASSISTANT_VOICE, own))


def held_out_clips(real_data: Path | None, hold_out: str = "yweweler") -> dict[str, list[Clip]]:
    """Clips of every figure: ``human`` (may be empty), ``synthetic`` digits, ``sentences`` (questions)."""
    book = ClipBook()
    return {
        "human": [_human(utterance) for utterance in load_human_digits(real_data, hold_out).held_out],
        "synthetic": [clip for voice in HELD_OUT_VOICES for clip in _say_all(book, voice, DIGITS)],
        "sentences": [clip for voice in HELD_OUT_VOICES for clip in _say_all(book, voice, spoken_questions())],
    }


def digest(clips: Iterable[Clip]) -> str:
    """sha256 over ids and 16-bit samples."""
    whole = hashlib.sha256()
    for clip in clips:
        whole.update(clip.id.encode())
        whole.update((clip.wave_S * 32767).round().to(torch.int16).numpy().tobytes())
    return whole.hexdigest()


def _human(utterance: Utterance) -> Clip:
    wave = resample(utterance.wave, utterance.rate, CLIP_RATE_HZ, utterance.id)
    return _clip(wave, DIGITS[utterance.digit], "human", utterance.speaker, utterance.id)


def _say_all(book: ClipBook, voice: Voice, texts: Sequence[str]) -> Iterator[Clip]:
    for text in texts:
        kind = "sentence" if " " in text else "word"
        name = f"{voice.name}/{voice.words_per_minute}/{voice.pitch}/{text.replace(' ', '-')}"
        yield _clip(book.wave(voice, text), text, kind, voice.name, name)


def _clip(wave: Wave, text: str, kind: str, source: str, name: str) -> Clip:
    wave_S = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    return Clip(wave_S=wave_S, words=tuple(text.split()), kind=kind, source=source, id=name)
