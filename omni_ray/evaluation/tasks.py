"""Held-out questions: which samples ask for which figure, and how written answers are scored.

A sample's ``facts`` name its task and the right answer; the last message, which holds that answer, is never shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.sources import WebDatasetSource
from omni_ray.evaluation.metrics import HeldOutFigure, same_words, share
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

HELD_OUT = "held_out"
"""Shards of this split."""
UNSEEN_WRITERS = "mnist"
"""Origin of pictures by writers that no training picture has; scikit-learn's writers carry no ids."""
ANSWER_TOKENS = 12
"""Longest written answer; right ones have at most five tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A conversation that waits for the model's turn."""

    key: str
    """Key of the sample."""
    messages: tuple[Mapping[str, Any], ...]
    """All turns before the answer."""
    media: Mapping[str, bytes]
    """Encoded bytes by member name."""
    expected: str
    """Right answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A model's turn."""

    text: str
    """Its words."""
    wave_S: NDArray[np.float32] | None = None
    """Its sound, where it was asked to speak; empty when it said nothing."""
    sample_rate_hz: int = 0
    """Of the sound."""


class Answerer(Protocol):
    """Whatever answers: a model in this process, or one behind an endpoint."""

    def answer(self, questions: Sequence[Question], *, aloud: bool, max_tokens: int) -> list[Said]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """A figure over written answers."""

    figure: str
    """Its name."""
    asks: str
    """``facts["task"]`` of its samples."""
    most: int
    """Samples of a task drawn where there are more."""
    also: str = ""
    """A second task that counts with the first."""
    task: str = ""
    """What is asked of what, for a figure beside the targets."""
    chance: float | None = None
    """What guessing gets, for a figure beside the targets."""

    def samples(self, held_out: HeldOut) -> list[Sample]:
        """Those of the task, or of both."""
        return held_out.of(self.asks, self.most) + (held_out.of(self.also, self.most) if self.also else [])


TEXT_TASKS: tuple[TextTask, ...] = (
    TextTask(figure="image_digit_accuracy", asks="image_digit", most=300),
    TextTask(figure="image_colour_accuracy", asks="image_colour", most=300),
    TextTask(figure="video_direction_accuracy", asks="video_direction", most=200),
    TextTask(figure="audio_human_accuracy", asks="audio_human", most=250),
    TextTask(figure="audio_synthetic_accuracy", asks="audio_synthetic", most=150),
    TextTask(figure="cross_modal_accuracy", asks="cross_modal_both", most=200),
    # A model that never listens may still answer both words every time; asked for one of them, it is found out.
    TextTask(
        figure="cross_modal_one_word_accuracy",
        asks="cross_modal_digit",
        also="cross_modal_colour",
        most=100,
        task="spoken question about a picture: the one word asked for, not both",
        chance=1 / 6,
    ),
    TextTask(figure="text_accuracy", asks="text", most=200),
)
DIALOGUE_TASK = TextTask(figure="dialogue_memory_accuracy", asks="dialogue_memory", most=150)
SPOKEN_TASK = "spoken_answer"
CODEC_TASK = "codec_phrase"
"""Whole phrases of unseen combinations in the assistant's voice, for the codec alone."""
"""Task of the samples that ask for speech."""


class HeldOut:
    """The held-out samples below a data root, by task.

    Args:
        root: Folder of a built world.  limit: Samples per task at most.  seed: Which ones, where some are left out.
    Raises:
        DataError: there are no held-out shards.
    """

    def __init__(self, root: Path, *, limit: int | None = None, seed: int = 0) -> None:
        self._limit, self._seed = limit, seed
        self._by_task: dict[str, list[Sample]] = {}
        for sample in _held_out_samples(root):
            self._by_task.setdefault(str(sample.facts.get("task", "")), []).append(sample)

    def of(self, task: str, most: int | None = None, **facts: Any) -> list[Sample]:
        """Samples of one task whose facts have these values: all in shard order, or so many drawn by the seed."""
        found = [s for s in self._by_task.get(task, []) if all(s.facts.get(k) == v for k, v in facts.items())]
        most = min(x for x in (most, self._limit, len(found)) if x is not None)
        if most == len(found):
            return found
        drawn = np.random.default_rng([self._seed, len(found)]).permutation(len(found))[:most]
        return [found[int(place)] for place in sorted(drawn)]

    def first(self, task: str, most: int | None = None) -> list[Sample]:
        """The first samples of a task in shard order, which goes round by round over what is asked."""
        found = self._by_task.get(task, [])
        return found[: min(x for x in (most, self._limit, len(found)) if x is not None)]


def _held_out_samples(root: Path) -> Iterator[Sample]:
    folders = sorted(folder.parent for folder in root.glob(f"*/{HELD_OUT}-*.tar")) if root.is_dir() else []
    if not folders:
        raise DataError(f"{root} has no held-out shards (SOURCE/{HELD_OUT}-*.tar); build them: omni-ray data build")
    for folder in dict.fromkeys(folders):
        yield from WebDatasetSource(folder, folder.name, split=HELD_OUT)


def question_of(sample: Sample) -> Question:
    """The sample without its answer."""
    messages = sample.messages[:-1]
    names = {part.get("media") for message in messages for part in _parts(message)}
    media = {name: raw for name, raw in sample.media.items() if name in names}
    return Question(key=sample.key, messages=messages, media=media, expected=str(sample.facts["answer"]))


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content", ())
    return [] if isinstance(content, str) else list(content)


def score_text(answerer: Answerer, samples: Sequence[Sample]) -> list[bool]:
    """Whether each written answer is the right words and no others."""
    questions = [question_of(sample) for sample in samples]
    said = answerer.answer(questions, aloud=False, max_tokens=ANSWER_TOKENS)
    return [same_words(turn.text, question.expected) for turn, question in zip(said, questions, strict=True)]


def text_figures(answerer: Answerer, held_out: HeldOut) -> list[HeldOutFigure]:
    """All figures over written answers; pictures of unseen writers decide where they are at hand."""
    figures = []
    for task in TEXT_TASKS:
        if task.asks == "image_digit":
            figures += _digit_figures(answerer, held_out, task)
            continue
        right = score_text(answerer, task.samples(held_out))
        why = "no human speech: OMNI_RAY_REAL_DATA names no recordings" if task.asks == "audio_human" else "no samples"
        figures.append(share(task.figure, sum(right), len(right), chance=task.chance, task=task.task, left_out=why))
    return figures


def count_questions(held_out: HeldOut, most_spoken: int) -> int:
    """How many answers all figures together will ask for, for a progress line."""
    written = [len(task.samples(held_out)) for task in TEXT_TASKS if task.asks != "image_digit"]
    digits = [len(held_out.of("image_digit", TEXT_TASKS[0].most, writers=w)) for w in ("sklearn", UNSEEN_WRITERS)]
    talks = held_out.of(DIALOGUE_TASK.asks, DIALOGUE_TASK.most)
    turns = [1 + sum(m["role"] == "assistant" for m in sample.messages[:-1]) for sample in talks]
    return sum(written) + sum(digits) + sum(turns) + len(held_out.first(SPOKEN_TASK, most_spoken))


def _digit_figures(answerer: Answerer, held_out: HeldOut, task: TextTask) -> list[HeldOutFigure]:
    sklearn = score_text(answerer, held_out.of(task.asks, task.most, writers="sklearn"))
    writers = score_text(answerer, held_out.of(task.asks, task.most, writers=UNSEEN_WRITERS))
    row = share(task.figure, 0, 0)
    beside = share(
        f"{task.figure}_sklearn",
        sum(sklearn),
        len(sklearn),
        chance=row.chance,
        task="picture → digit, unseen scikit-learn pictures",
    )
    if not writers:
        return [share(task.figure, sum(sklearn), len(sklearn), pictures="sklearn"), beside]
    return [share(task.figure, sum(writers), len(writers), pictures=UNSEEN_WRITERS), beside]


def dialogue_figure(answerer: Answerer, held_out: HeldOut) -> HeldOutFigure:
    """A later question about an earlier picture, asked after the model's own earlier answers."""
    samples = held_out.of(DIALOGUE_TASK.asks, DIALOGUE_TASK.most)
    questions = [question_of(sample) for sample in samples]
    talks: list[list[Mapping[str, Any]]] = [[] for _ in questions]
    turns = max((len(question.messages) for question in questions), default=0)
    for turn in range(turns):
        waiting = []
        for place, question in enumerate(questions):
            if turn >= len(question.messages):
                continue
            if question.messages[turn]["role"] == "assistant":
                waiting.append(place)
            else:
                talks[place].append(question.messages[turn])
        for place, said in zip(waiting, _turns(answerer, questions, talks, waiting), strict=True):
            talks[place].append({"role": "assistant", "content": [{"type": "text", "text": said.text}]})
    final = _turns(answerer, questions, talks, range(len(questions)))
    right = [same_words(said.text, question.expected) for said, question in zip(final, questions, strict=True)]
    return share(DIALOGUE_TASK.figure, sum(right), len(right), history="the model's own answers")


def _turns(
    answerer: Answerer, questions: Sequence[Question], talks: Sequence[list[Mapping[str, Any]]], which: Sequence[int]
) -> list[Said]:
    asked = [
        Question(
            key=questions[place].key,
            messages=tuple(talks[place]),
            media=_media_of(talks[place], questions[place].media),
            expected="",
        )
        for place in which
    ]
    return answerer.answer(asked, aloud=False, max_tokens=ANSWER_TOKENS) if asked else []


def _media_of(messages: Sequence[Mapping[str, Any]], media: Mapping[str, bytes]) -> dict[str, bytes]:
    names = {part.get("media") for message in messages for part in _parts(message)}
    return {name: raw for name, raw in media.items() if name in names}
