"""A checkpoint's model as the one who answers held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from omni_ray.evaluation.tasks import Question, Said
from omni_ray.inference.omni_model import OmniModel, load_model
from omni_ray.inference.prompt import Conversation
from omni_ray.models.codec import Codec

TOGETHER = 128
"""Conversations answered in one batch; more would only grow memory."""


class ModelAnswerer:
    """Answers with a model in this process, likeliest ids only.

    Args:
        answered: Called with a number of answers whenever so many more are there.
    """

    def __init__(self, model: OmniModel, answered: Callable[[int], None] | None = None) -> None:
        self.model, self._answered = model, answered

    @classmethod
    def load(cls, checkpoint: Path, answered: Callable[[int], None] | None = None) -> Self:
        """Read a checkpoint.

        Raises:
            CheckpointError: it is not whole, or does not fit.
        """
        return cls(load_model(checkpoint), answered)

    @property
    def codec(self) -> Codec:
        """The model's codec."""
        return self.model.codec

    @property
    def speech_rate_hz(self) -> int:
        """Rate of the model's voice."""
        return self.model.config.codec.output_rate_hz

    def answer(self, questions: Sequence[Question], *, aloud: bool, max_tokens: int) -> list[Said]:
        """Answer every question, in order."""
        said: list[Said] = []
        for start in range(0, len(questions), TOGETHER):
            talks = [Conversation(messages=q.messages, media=q.media) for q in questions[start : start + TOGETHER]]
            answers = self.model.generate(talks, voice=aloud, max_tokens=max_tokens)
            said += [Said(text=a.text, wave_S=a.wave_S, sample_rate_hz=a.sample_rate_hz) for a in answers]
            if self._answered is not None:
                self._answered(len(answers))
        return said
