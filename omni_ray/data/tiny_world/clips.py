"""Spoken clips of the tiny world: each voice says its list once, samples pick from it."""

from __future__ import annotations

import numpy as np

from omni_ray.data.audio import Wave, encode_flac, resample
from omni_ray.data.tiny_world.corpus import HEAR, QUESTIONS, knowledge
from omni_ray.data.tiny_world.speech import ASSISTANT_VOICE, Utterance, Voice, speak_all, trim
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, pairs, phrase

CLIP_RATE_HZ = 16000
_PEAK = 0.6
_PHRASES_PER_VOICE, _FACTS_PER_VOICE, _SAYS_PER_VOICE = 4, 4, 4


class ClipBook:
    """16 kHz clips by voice and text, cut to the sound and encoded as flac, made when first asked for."""

    def __init__(self) -> None:
        self._raw: dict[tuple[Voice, str], tuple[Wave, int]] = {}
        self._waves: dict[tuple[Voice, str], Wave] = {}
        self._flac: dict[tuple[Voice, str], bytes] = {}

    def wave(self, voice: Voice, text: str) -> Wave:
        """[S] float32 at 16 kHz."""
        if (voice, text) not in self._waves:
            if (voice, text) not in self._raw:
                self._record(voice, text)
            wave, rate = self._raw.pop((voice, text))
            self._waves[voice, text] = level(resample(trim(wave, rate), rate, CLIP_RATE_HZ))
        return self._waves[voice, text]

    def flac(self, voice: Voice, text: str) -> bytes:
        """The clip encoded."""
        if (voice, text) not in self._flac:
            self._flac[voice, text] = encode_flac(self.wave(voice, text), CLIP_RATE_HZ)
        return self._flac[voice, text]

    def _record(self, voice: Voice, text: str) -> None:
        """Say the list that holds the text: a synthetic speaker starts once for a list, and lists never change."""
        listed = next((texts for texts in lists_of(voice) if text in texts), (text,))
        waves, rate = speak_all(listed, voice)
        self._raw.update({(voice, said): (wave, rate) for said, wave in zip(listed, waves, strict=True)})


def lists_of(voice: Voice) -> tuple[tuple[str, ...], ...]:
    """What a synthetic speaker says, in lists said in one go; the assistant says each text on its own."""
    if voice == ASSISTANT_VOICE:
        return ()
    own = (*own_phrases(voice), *own_facts(voice), *own_says(voice))
    return DIGITS, (*COLOURS, *DIRECTIONS), spoken_questions(), own


def spoken_questions() -> tuple[str, ...]:
    """Every question about a picture or a clip."""
    return (*(wording for wordings in QUESTIONS.values() for wording in wordings), HEAR)


def own_phrases(voice: Voice) -> tuple[str, ...]:
    """Colour-digit phrases of one voice, of training pairs."""
    return _share([phrase(c, d) for c, d in pairs(False)], voice, _PHRASES_PER_VOICE)


def own_facts(voice: Voice) -> tuple[str, ...]:
    """Knowledge questions of one voice."""
    return _share([question for question, _ in knowledge()], voice, _FACTS_PER_VOICE)


def own_says(voice: Voice) -> tuple[str, ...]:
    """Requests to say a training phrase, of one voice."""
    return _share([f"say {phrase(c, d)}" for c, d in pairs(False)], voice, _SAYS_PER_VOICE)


def level(wave: Wave) -> Wave:
    """Scale to one peak, so that no voice is loud."""
    peak = float(np.abs(wave).max(initial=0.0))
    return wave if peak == 0.0 else (wave * np.float32(_PEAK / peak)).astype(np.float32)


def human_flac(utterance: Utterance) -> bytes:
    """A person's recording at its own rate."""
    return encode_flac(utterance.wave, utterance.rate)


def _share(texts: list[str], voice: Voice, count: int) -> tuple[str, ...]:
    """A few of the texts, spread over the voices by the voice's name."""
    start = sum((i + 1) * ord(letter) for i, letter in enumerate(voice.name))
    return tuple(dict.fromkeys(texts[(start + 7 * i) % len(texts)] for i in range(count)))
