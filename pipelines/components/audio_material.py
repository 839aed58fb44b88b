"""What the tiny audio encoder learns from: people's digits, and words and sentences in many synthetic voices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_ray.data.audio import resample
from omni_ray.data.tiny_world.speech import (
    ASSISTANT_VOICE,
    HELD_OUT_VOICES,
    TRAIN_VOICES,
    Voice,
    load_human_digits,
    speak,
)
from omni_ray.data.tiny_world.words import DIGITS, all_words, pairs, phrase

SAMPLE_RATE_HZ = 16000

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
    "say the digit and the colour",
    "repeat the words",
)
"""Spoken questions; their words and the world's content words are the CTC units."""


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


def vocabulary() -> tuple[str, ...]:
    """CTC units: the blank (id 0), then content words and the other words of the sentences in first-seen order."""
    spoken = [word for sentence in SENTENCES for word in sentence.split()]
    return ("<blank>", *dict.fromkeys((*all_words(), *spoken)))


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
    clips = [_clip(u.wave, u.rate, DIGITS[u.digit], "human", u.speaker, u.id) for u in people]
    clips += _spoken(TRAIN_VOICES, [*all_words(), *SENTENCES, *(phrase(*pair) for pair in pairs(held_out=False))])
    # The assistant's voice is part of the world: the model will hear itself on sound tracks.
    return clips + list(_say_all(ASSISTANT_VOICE, [*all_words(), *SENTENCES]))


def held_out_clips(real_data: Path | None, hold_out: str = "yweweler") -> dict[str, list[Clip]]:
    """Clips of every figure: ``human`` (may be empty), ``synthetic`` single words, ``sentences``."""
    people = load_human_digits(real_data, hold_out).held_out
    return {
        "human": [_clip(u.wave, u.rate, DIGITS[u.digit], "human", u.speaker, u.id) for u in people],
        "synthetic": [clip for voice in HELD_OUT_VOICES for clip in _say_all(voice, DIGITS)],
        "sentences": [clip for voice in HELD_OUT_VOICES for clip in _say_all(voice, SENTENCES)],
    }


def digest(clips: Iterable[Clip]) -> str:
    """sha256 over ids and 16-bit samples."""
    whole = hashlib.sha256()
    for clip in clips:
        whole.update(clip.id.encode())
        whole.update((clip.wave_S * 32767).round().to(torch.int16).numpy().tobytes())
    return whole.hexdigest()


def _spoken(voices: Sequence[Voice], texts: Sequence[str]) -> list[Clip]:
    """Every voice says every single word twice at its own and another pitch and pace, and a share of the rest."""
    singles = [text for text in texts if " " not in text]
    longer = [text for text in texts if " " in text]
    clips: list[Clip] = []
    for i, voice in enumerate(voices):
        share = longer[i % 3 :: 3]
        other = replace(voice, words_per_minute=voice.words_per_minute + 45, pitch=(voice.pitch + 35) % 100)
        clips += _say_all(voice, [*singles, *share])
        clips += _say_all(other, singles)
    return clips


def _say_all(voice: Voice, texts: Sequence[str]) -> Iterator[Clip]:
    for text in texts:
        wave, rate = speak(text, voice)
        kind = "sentence" if " " in text else "word"
        name = f"{voice.name}/{voice.words_per_minute}/{voice.pitch}/{text.replace(' ', '-')}"
        yield _clip(wave, rate, text, kind, voice.name, name)


def _clip(wave: np.ndarray, rate: int, text: str, kind: str, source: str, name: str) -> Clip:
    samples = wave if rate == SAMPLE_RATE_HZ else resample(wave, rate, SAMPLE_RATE_HZ, name)
    wave_S = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    return Clip(wave_S=wave_S, words=tuple(text.split()), kind=kind, source=source, id=name)
