"""Going on where a replica was lost: what it had made is known here, and another is given it again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.observability.events import emit
from omni_ray.types.batch import NUM_CODEBOOKS
from omni_ray.types.modality import Modality
from pipelines.serving.errors import ApiError
from pipelines.serving.language_loop import ROW_S
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError, Stages

# R generated rows, N codec frames, S samples, D model width

TRIES = 3
"""Times that something lost is built again without progress in between."""


class Progress:
    """How far an answer has come, so that another replica can go on with it."""

    def __init__(self, options: AnswerOptions) -> None:
        self._options = options
        self._made: list[NDArray[np.int64]] = []
        self._began = 0.0
        self._ended = False

    def note(self, part: AnswerRows) -> None:
        """Rows have come."""
        self._began = self._began or time.monotonic()
        self._made.append(part.ids_R5)
        self._ended = self._ended or part.ended

    @property
    def ended(self) -> bool:
        """Nothing is left to make."""
        return self._ended or sum(map(len, self._made)) >= self._options.max_tokens

    def left(self) -> AnswerOptions:
        """What is still to be made, no further ahead of the listener than was asked for."""
        if not self._made:
            return self._options
        made_R5 = np.concatenate(self._made)
        ahead = len(made_R5) - int((time.monotonic() - self._began) / ROW_S)
        return replace(
            self._options,
            made_R5=made_R5,
            max_tokens=self._options.max_tokens - len(made_R5),
            burst_rows=max(0, self._options.burst_rows - max(0, ahead)),
        )


async def answer_alone(stages: Stages, session: str, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
    """An answer in a session that holds nothing else; the same rows whatever was lost on the way.

    Raises:
        ApiError: the language stage failed :data:`TRIES` times without a row in between.
    """
    progress, failed = Progress(options), 0
    while failed < TRIES:
        try:
            async with aclosing(stages.answer(session, 0, rows, progress.left())) as parts:  # type: ignore[type-var]
                async for part in parts:
                    failed = 0
                    progress.note(part)
                    yield part
            return
        except SessionLostError:
            lost("language")
            if progress.ended:
                return
            failed += 1
    raise gone("language")


async def encode(stages: Stages, modality: Modality, media: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """Rows [n, D] of whole media items.

    Raises:
        ApiError: the stage failed :data:`TRIES` times.
    """
    for _ in range(TRIES):
        try:
            return await stages.encode(modality, media)
        except SessionLostError:
            lost(modality)
    raise gone(modality)


class Voice:
    """The sound of one answer, in order, from whichever decoder holds it."""

    def __init__(self, session: str, answer: int) -> None:
        """``answer`` is its number in the session."""
        self._session, self._answer = session, answer
        self._codes_N4 = np.zeros((0, NUM_CODEBOOKS), np.int64)
        self._samples = 0

    @property
    def begun(self) -> bool:
        """Whether a frame was decoded."""
        return len(self._codes_N4) > 0

    async def say(self, codes: Sequence[NDArray[np.int64]], final: bool, stages: Stages) -> NDArray[np.float32]:
        """Sound [S] that these frames make certain; a decoder that lost the answer decodes it from its beginning.

        Raises:
            ApiError: the speech stage failed :data:`TRIES` times.
        """
        first, before = len(self._codes_N4), self._samples
        self._codes_N4 = np.concatenate([self._codes_N4, *[code_4[None] for code_4 in codes]])
        for number in range(TRIES):
            start = 0 if number else first
            try:
                wave_S: NDArray[np.float32] = await stages.say(
                    self._session, self._answer, start, self._codes_N4[start:], final
                )
            except SessionLostError:
                lost("speech")
                continue
            wave_S = wave_S[before:] if number else wave_S
            self._samples += len(wave_S)
            return wave_S
        raise gone("speech")


def lost(stage: str) -> None:
    """One line for the log."""
    emit("session_rebuilt", stage=str(stage))


def gone(stage: str) -> ApiError:
    """What a client is told."""
    return ApiError(503, f"the {stage!s} stage failed; try again", code="stage_failed", headers={"retry-after": "1"})
