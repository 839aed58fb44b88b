"""Spoken answers and codec reconstructions, judged by recognisers that this project did not train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.data.audio import decode_audio
from omni_ray.data.tiny_world.words import COLOURS, DIGITS
from omni_ray.evaluation.judges import Grammar, GrammarJudge, Judge, OpenJudge, WordScore, judge_clips
from omni_ray.evaluation.metrics import HeldOutFigure, same_words, share, slots_right
from omni_ray.evaluation.tasks import CODEC_TASK, SPOKEN_TASK, Answerer, HeldOut, Said, question_of
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
) -> Callable[[], list[HeldOutFigure]]:
    """Let the model speak and the judges listen: codec, then spoken answers.

    Args:
        codec_rate_hz: Rate of the codec's sound.  with_open: Ask the open-vocabulary recogniser as well, if installed;
            it is slow, so it listens in a thread of its own while the caller goes on.
    Returns:
        A function that waits for the judges and gives the figures; without a recogniser all are left out by name.
    """
    samples = held_out.first(SPOKEN_TASK, MOST_SPOKEN)
    try:
        grammar = GrammarJudge(PHRASE)
    except DataError as missing:
        names = ("codec_word_accuracy_ratio", "spoken_answer_word_accuracy", "spoken_answer_exact")
        left_out = [share(name, 0, 0, left_out=str(missing)) for name in names]
        return lambda: left_out
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="open-judge")
    other = open_judge() if with_open and samples else None

    def listen(clips: Sequence[Clip], said: Sequence[Sequence[str]]) -> Future[WordScore] | None:
        return None if other is None else thread.submit(judge_clips, other, clips, said)

    phrases = held_out.first(CODEC_TASK)
    said = _words(phrases)
    original = [(decode_audio(next(iter(s.media.values())), s.key), 16000) for s in phrases]
    rebuilt = [(codec.decode(codec.encode(wave, rate)).numpy(), codec_rate_hz) for wave, rate in original]
    open_codec = listen(original, said), listen(rebuilt, said)
    answers = answerer.answer([question_of(s) for s in samples], aloud=True, max_tokens=SPEECH_TOKENS)
    open_answers = listen([_clip(a) for a in answers[:OPEN_JUDGED]], _words(samples[:OPEN_JUDGED]))
    figures = _codec_figures(grammar, original, rebuilt, said), _answer_figures(grammar, samples, answers)

    def collect() -> list[HeldOutFigure]:
        thread.shutdown(wait=True)
        return [*figures[0], *_open_codec(*open_codec), *figures[1], *_open_answers(open_answers)]

    return collect


def _words(samples: Sequence[Sample]) -> list[list[str]]:
    return [str(sample.facts["answer"]).split() for sample in samples]


def _codec_figures(
    grammar: Judge, original: Sequence[Clip], rebuilt: Sequence[Clip], said: Sequence[Sequence[str]]
) -> list[HeldOutFigure]:
    before, after = hear(grammar, original, said), hear(grammar, rebuilt, said)
    scale = before.words / before.right if before.right else 1.0
    kept = before.right / before.words if before.words else None
    name = "codec_word_accuracy_ratio"
    return [share(name, after.right, after.words, scale=scale, judge=grammar.name, original=kept)]


def _open_codec(original: Future[WordScore] | None, rebuilt: Future[WordScore] | None) -> list[HeldOutFigure]:
    if original is None or rebuilt is None:
        return []
    before, after = original.result(), rebuilt.result()
    figure = share(
        "codec_word_accuracy_ratio_open",
        after.heard,
        after.words,
        scale=before.words / before.heard if before.heard else 1.0,
        task="the same by an open-vocabulary recogniser",
        original=before.accuracy,
    )
    return [figure]


def _answer_figures(grammar: Judge, samples: Sequence[Sample], answers: Sequence[Said]) -> list[HeldOutFigure]:
    heard = hear(grammar, [_clip(answer) for answer in answers], _words(samples))
    text_right = sum(same_words(a.text, str(s.facts["answer"])) for a, s in zip(answers, samples, strict=True))
    n, task = len(answers), "spoken answer, unseen combination"
    return [
        share("spoken_answer_word_accuracy", heard.right, heard.words, judge=grammar.name, clips=n),
        share("spoken_answer_exact", heard.exact, n, judge=grammar.name),
        share("spoken_answer_colour", heard.slot(0), n, chance=1 / len(COLOURS), task=f"{task}: its colour word"),
        share("spoken_answer_digit", heard.slot(1), n, chance=1 / len(DIGITS), task=f"{task}: its digit word"),
        share("spoken_answer_text", text_right, n, chance=1 / 60, task=f"{task}: the words written beside the sound"),
    ]


def _open_answers(score: Future[WordScore] | None) -> list[HeldOutFigure]:
    if score is None:
        return []
    found = score.result()
    task = "spoken answer, unseen combination, per word, by an open-vocabulary recogniser"
    return [share("spoken_answer_word_accuracy_open", found.heard, found.words, task=task, clips=found.clips)]


def _clip(answer: Said) -> Clip:
    wave = np.zeros(0, dtype=np.float32) if answer.wave_S is None else answer.wave_S
    return wave, answer.sample_rate_hz or 24000
