"""A few held-out questions for people to look at and listen to: a picture, a sound, a clip, and spoken ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_ray.data.audio import decode_audio
from omni_ray.evaluation.answerer import ModelAnswerer
from omni_ray.evaluation.metrics import same_words
from omni_ray.evaluation.spoken import SPEECH_TOKENS
from omni_ray.evaluation.tasks import ANSWER_TOKENS, HeldOut, Question, Said, question_of
from omni_ray.types.sample import Sample
from pipelines.chat import wav_bytes
from pipelines.report_page import Answer, Medium

PLAYED_RATE_HZ = 16000
MIME = {"png": "image/png", "jpg": "image/jpeg", "mp4": "video/mp4", "wav": "audio/wav"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """One kind of question to show."""

    name: str
    """Stem of its files."""
    title: str
    """For people."""
    asks: tuple[str, ...]
    """Tasks of the held-out samples; the first that is there is taken."""
    aloud: bool = False
    """Answer aloud."""
    first: bool = False
    """Show the first sample of its shard, which asks in the plainest words, instead of any."""


SHOWS: tuple[Show, ...] = (
    Show(name="image", title="A picture", asks=("image_both",)),
    Show(name="audio", title="A sound", asks=("audio_human", "audio_synthetic")),
    Show(name="video", title="A clip", asks=("video_direction",)),
    Show(name="spoken", title="Asked in writing, answered aloud", asks=("spoken_answer",), aloud=True, first=True),
    Show(
        name="spoken-picture",
        title="A spoken question about a picture, answered aloud",
        asks=("cross_modal_speech_both", "cross_modal_both"),
        aloud=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An answer with its files."""

    answer: Answer
    """For the page."""
    files: tuple[str, ...]
    """What was saved, the question's media first."""

    def to_json(self) -> dict[str, Any]:
        """Without the bytes."""
        told = self.answer
        return {
            "title": told.title,
            "question": told.question,
            "expected": told.expected,
            "said": told.said,
            "right": told.right,
            "files": list(self.files),
        }


def answer_all(checkpoint: Path, root: Path, folder: Path, *, seed: int = 0) -> list[Shown]:
    """Answer one held-out sample of each kind and save the media of question and answer under ``folder``.

    Samples are drawn by the seed, before any answer is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answerer, held_out = ModelAnswerer.load(checkpoint), HeldOut(root, seed=seed)
    shown = []
    for show in SHOWS:
        draw = held_out.first if show.first else held_out.of
        sample = next((found[0] for task in show.asks if (found := draw(task, 1))), None)
        if sample is None:
            continue
        question = question_of(sample)
        tokens = SPEECH_TOKENS if show.aloud else ANSWER_TOKENS
        said = answerer.answer([question], aloud=show.aloud, max_tokens=tokens)[0]
        shown.append(_shown(show, sample, question, said, folder))
    return shown


def _shown(show: Show, sample: Sample, question: Question, said: Said, folder: Path) -> Shown:
    files: list[str] = []
    media = []
    for name, raw in question.media.items():
        medium, ending = _playable(name, raw)
        media.append(medium)
        files.append(_save(folder / f"{show.name}-{Path(name).stem}.{ending}", medium.raw))
    spoken = None
    if said.wave_S is not None and said.wave_S.size:
        spoken = Medium(mime=MIME["wav"], raw=wav_bytes(said.wave_S, said.sample_rate_hz))
        files.append(_save(folder / f"{show.name}-answer.wav", spoken.raw))
    answer = Answer(
        title=show.title,
        question=_asked(question, sample.facts),
        expected=question.expected,
        said=said.text,
        right=same_words(said.text, question.expected),
        shown=tuple(media),
        spoken=spoken,
    )
    return Shown(answer=answer, files=tuple(files))


def _playable(name: str, raw: bytes) -> tuple[Medium, str]:
    """The medium in a form that every browser plays, and its ending."""
    ending = name.rsplit(".", 1)[-1]
    if ending not in MIME:
        ending, raw = "wav", wav_bytes(decode_audio(raw, name, PLAYED_RATE_HZ), PLAYED_RATE_HZ)
    return Medium(mime=MIME[ending], raw=raw), ending


def _save(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    return path.name


def _asked(question: Question, facts: Mapping[str, Any]) -> str:
    """The written part of the question, and who speaks where somebody does."""
    content = question.messages[-1]["content"]
    words = " ".join(part["text"] for part in content if part.get("type") == "text").replace("\n", ", ")
    speaker = facts.get("speaker") or (facts.get("voice") if any(p.get("type") == "audio" for p in content) else None)
    voice = f"(voice of {speaker}, never heard in training)" if speaker else ""
    return " ".join(filter(None, (words, voice)))
