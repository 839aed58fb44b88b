"""Spoken answers and codec reconstructions, judged by recognisers that this project did not train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.data.audio import decode_audio
from omni_ray.data.tiny_world.words import COLOURS, DIGITS
from omni_ray.evaluation.judges import Grammar, GrammarJudge, Judge, OpenJudge, judge_clips
from omni_ray.evaluation.metrics import HeldOutFigure, same_words, share, slots_right
from omni_ray.evaluation.tasks import SPOKEN_TASK, Answerer, HeldOut, Said, question_of
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

PHRASE = Grammar(slots=(tuple(COLOURS), DIGITS))
"""``red seven``: one of six words, then one of ten."""
SLOT_CHANCE = max(1.0 / len(words) for words in PHRASE.slots)
"""Chance of the easier slot."""
SPEECH_TOKENS = 48
"""Longest spoken answer in codec rows (2.9 s); the longest phrase of the world lasts 1.3 s."""
MOST_SPOKEN = 120
OPEN_JUDGED = 12
"""Clips a kind that the open-vocabulary recogniser hears: it takes half a second each."""

Wave = NDArray[np.float32]
Clip = tuple[Wave, int]
"""Mono samples and their rate in Hz."""
OpenJudgeMaker = Callable[[], Judge]


class SpeechCodec(Protocol):
    """What is asked of a codec."""

    def encode(self, wave: np.ndarray, sample_rate_hz: int) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a recogniser made of clips that should say two-word phrases."""

    slots: tuple[tuple[bool, ...], ...]
    """For each clip, which of its words was heard at its place."""

    @property
    def words(self) -> int:
        """Words said."""
        return sum(len(clip) for clip in self.slots)

    @property
    def right(self) -> int:
        """Words heard."""
        return sum(sum(clip) for clip in self.slots)

    @property
    def exact(self) -> int:
        """Clips of which every word was heard."""
        return sum(all(clip) for clip in self.slots)

    def slot(self, place: int) -> int:
        """Clips whose word at this place was heard."""
        return sum(clip[place] for clip in self.slots)


def hear(judge: Judge, clips: Sequence[Clip], said: Sequence[Sequence[str]]) -> Heard:
    """Play every clip to the judge; a clip without a sample counts as silence, not as an error."""
    heard = [judge.hear(wave, rate) if wave.size else () for wave, rate in clips]
    return Heard(slots=tuple(slots_right(words, answer) for words, answer in zip(said, heard, strict=True)))


def open_judge() -> Judge | None:
    """The open-vocabulary recogniser, or None where its packages are not installed."""
    try:
        return OpenJudge()
    except DataError:
        return None


def spoken_figures(
    answerer: Answerer, codec: SpeechCodec, codec_rate_hz: int, held_out: HeldOut, *, with_open: bool = True
) -> list[HeldOutFigure]:
    """Codec, then spoken answers; without a recogniser all are left out by name.

    Args:
        codec_rate_hz: Rate of the codec's sound.  with_open: Ask the open-vocabulary recogniser as well, if installed.
    """
    samples = held_out.first(SPOKEN_TASK, MOST_SPOKEN)
    try:
        grammar = GrammarJudge(PHRASE)
    except DataError as missing:
        names = ("codec_word_accuracy_ratio", "spoken_answer_word_accuracy", "spoken_answer_exact")
        return [share(name, 0, 0, left_out=str(missing)) for name in names]
    other = open_judge() if with_open else None
    phrases = _one_each(samples)
    original = [(decode_audio(s.media["answer.flac"], s.key), 16000) for s in phrases]
    rebuilt = [(codec.decode(codec.encode(wave, rate)).numpy(), codec_rate_hz) for wave, rate in original]
    said = [str(s.facts["answer"]).split() for s in phrases]
    figures = _codec_figures(grammar, other, original, rebuilt, said)
    answers = answerer.answer([question_of(s) for s in samples], aloud=True, max_tokens=SPEECH_TOKENS)
    return figures + _answer_figures(grammar, other, samples, answers)


def _one_each(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of each phrase."""
    return list({sample.facts["answer"]: sample for sample in reversed(samples)}.values())[::-1]


def _codec_figures(
    grammar: Judge,
    other: Judge | None,
    original: Sequence[Clip],
    rebuilt: Sequence[Clip],
    said: Sequence[Sequence[str]],
) -> list[HeldOutFigure]:
    before, after = hear(grammar, original, said), hear(grammar, rebuilt, said)
    scale = before.words / before.right if before.right else 1.0
    figures = [
        share(
            "codec_word_accuracy_ratio",
            after.right,
            after.words,
            scale=scale,
            judge=grammar.name,
            original=before.right / before.words if before.words else None,
        )
    ]
    if other is not None and said:
        first, then = (judge_clips(other, clips, said) for clips in (original, rebuilt))
        figures.append(
            share(
                "codec_word_accuracy_ratio_open",
                then.heard,
                then.words,
                scale=first.words / first.heard if first.heard else 1.0,
                chance=0.0,
                task="the same by an open-vocabulary recogniser",
                judge=other.name,
                original=first.accuracy,
            )
        )
    return figures


def _answer_figures(
    grammar: Judge, other: Judge | None, samples: Sequence[Sample], answers: Sequence[Said]
) -> list[HeldOutFigure]:
    said = [str(sample.facts["answer"]).split() for sample in samples]
    clips = [_clip(answer) for answer in answers]
    heard = hear(grammar, clips, said)
    text_right = sum(same_words(a.text, str(s.facts["answer"])) for a, s in zip(answers, samples, strict=True))
    n, task = len(clips), "spoken answer, unseen combination"
    figures = [
        share("spoken_answer_word_accuracy", heard.right, heard.words, judge=grammar.name, clips=n),
        share("spoken_answer_exact", heard.exact, n, judge=grammar.name),
        share("spoken_answer_colour", heard.slot(0), n, chance=1 / len(COLOURS), task=f"{task}: its colour word"),
        share("spoken_answer_digit", heard.slot(1), n, chance=1 / len(DIGITS), task=f"{task}: its digit word"),
        share("spoken_answer_text", text_right, n, chance=1 / 60, task=f"{task}: the words written beside the sound"),
    ]
    if other is not None and n:
        score = judge_clips(other, clips[:OPEN_JUDGED], said[:OPEN_JUDGED])
        figures.append(
            share(
                "spoken_answer_word_accuracy_open",
                score.heard,
                score.words,
                chance=0.0,
                task=f"{task}, per word, by an open-vocabulary recogniser",
                judge=other.name,
                clips=score.clips,
            )
        )
    return figures


def _clip(answer: Said) -> Clip:
    wave = np.zeros(0, dtype=np.float32) if answer.wave_S is None else answer.wave_S
    return wave, answer.sample_rate_hz or 24000
