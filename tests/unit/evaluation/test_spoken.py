"""Spoken answers judged by a recogniser this project did not train: a voice that is right, half right, and silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from held_out_world import write_samples
from torch import Tensor

from omni_ray.data.audio import encode_flac
from omni_ray.data.tiny_world.speech import speak_all
from omni_ray.data.tiny_world.words import pairs, phrase
from omni_ray.evaluation.metrics import HeldOutFigure
from omni_ray.evaluation.spoken import spoken_figures
from omni_ray.evaluation.tasks import HeldOut, Question, Said
from omni_ray.models.resample import resample

PHRASES = tuple(phrase(*pair) for pair in pairs(True)[:5])
Say = Callable[[str], str]


class Voice:
    """Says what a rule makes of the right answer, in the assistant's voice."""

    def __init__(self, waves: dict[str, np.ndarray], rule: Say) -> None:
        self.waves, self.rule = waves, rule

    def answer(self, questions: Sequence[Question], *, aloud: bool, max_tokens: int) -> list[Said]:
        assert aloud
        said = [self.rule(question.expected) for question in questions]
        silence = np.zeros(0, np.float32)
        return [Said(text=text, wave_S=self.waves.get(text, silence), sample_rate_hz=24000) for text in said]


class LosslessCodec:
    """Its codes are the samples."""

    def encode(self, wave: np.ndarray, sample_rate_hz: int) -> Tensor:
        return resample(torch.from_numpy(wave), sample_rate_hz, 24000)

    def decode(self, codes: Tensor) -> Tensor:
        return codes


class DeafCodec(LosslessCodec):
    """Loses everything."""

    def decode(self, codes: Tensor) -> Tensor:
        return torch.zeros_like(codes)


@pytest.fixture(scope="module")
def waves() -> dict[str, np.ndarray]:
    texts = [*PHRASES, *(swapped(text) for text in PHRASES)]
    return dict(zip(texts, speak_all(texts)[0], strict=True))


@pytest.fixture(scope="module")
def held_out(waves: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    folder = tmp_path_factory.mktemp("spoken")
    samples = []
    for text in PHRASES * 2:
        said = {"role": "voice", "content": [{"type": "speech", "media": "answer.flac", "text": text}]}
        asked = {"role": "user", "content": [{"type": "text", "text": f"say {text}"}]}
        facts = {"task": "spoken_answer", "answer": text}
        samples.append(("speech_say", [asked, said], {"answer.flac": encode_flac(waves[text], 24000)}, facts))
    for text in PHRASES:
        asked = {"role": "user", "content": [{"type": "speech", "media": "heard.flac"}]}
        facts = {"task": "codec_phrase", "answer": text}
        samples.append(("speech_hear", [asked], {"heard.flac": encode_flac(waves[text], 24000)}, facts))
    write_samples(folder / "speech_text", samples)
    return HeldOut(folder)


def swapped(text: str) -> str:
    """The same colour with a digit word far from the right one."""
    colour, digit = text.split()
    return f"{colour} {'six' if digit != 'six' else 'four'}"


def figures_of(
    held_out: HeldOut, waves: dict[str, np.ndarray], rule: Say, codec: LosslessCodec | None = None
) -> dict[str, HeldOutFigure]:
    voice = Voice(waves, rule)
    collect = spoken_figures(voice, codec or LosslessCodec(), 24000, held_out, with_open=False)
    return {figure.name: figure for figure in collect()}


def test_a_right_voice_is_understood(held_out: HeldOut, waves: dict[str, np.ndarray]) -> None:
    figures = figures_of(held_out, waves, lambda text: text)
    assert figures["spoken_answer_word_accuracy"].value == 1.0
    assert figures["spoken_answer_exact"].value == 1.0
    assert figures["spoken_answer_word_accuracy"].n == 2 * figures["spoken_answer_exact"].n == 20
    assert figures["codec_word_accuracy_ratio"].value == 1.0
    assert figures["codec_word_accuracy_ratio"].n == 2 * len(PHRASES)


def test_a_wrong_digit_costs_its_slot_alone(held_out: HeldOut, waves: dict[str, np.ndarray]) -> None:
    figures = figures_of(held_out, waves, swapped)
    assert figures["spoken_answer_colour"].value == 1.0
    assert figures["spoken_answer_digit"].value == 0.0
    assert figures["spoken_answer_exact"].value == 0.0
    assert figures["spoken_answer_text"].value == 0.0


def test_silence_is_no_word(held_out: HeldOut, waves: dict[str, np.ndarray]) -> None:
    figures = figures_of(held_out, waves, lambda text: f"{text}!")
    assert figures["spoken_answer_word_accuracy"].value == 0.0
    assert figures["spoken_answer_text"].value == 1.0


def test_a_codec_that_loses_the_sound_is_noticed(held_out: HeldOut, waves: dict[str, np.ndarray]) -> None:
    figures = figures_of(held_out, waves, lambda text: text, DeafCodec())
    assert figures["codec_word_accuracy_ratio"].value is not None
    assert figures["codec_word_accuracy_ratio"].value < 0.5
    assert figures["codec_word_accuracy_ratio"].extra["original"] == 1.0


def test_without_samples_the_figures_are_left_out(tmp_path: Path, waves: dict[str, np.ndarray]) -> None:
    write_samples(tmp_path / "text", [("text", [], {}, {"task": "text", "answer": "red"})])
    figures = figures_of(HeldOut(tmp_path), waves, lambda text: text)
    assert {figure.value for figure in figures.values()} == {None}
