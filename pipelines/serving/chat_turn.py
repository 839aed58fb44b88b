"""One chat answer as it is generated: words up to a stop, sound, log-probabilities, counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.batch import AUDIO_PAD
from omni_ray.types.modality import FEATURE_MODALITIES
from pipelines.serving.prompt import Prompt
from pipelines.serving.realtime.speaking import FrameReader, TextReader
from pipelines.serving.resume import Voice, answer_alone, encode
from pipelines.serving.stages import AnswerOptions, Rows, Stages

Logprob = tuple[int, float, tuple[tuple[int, float], ...]]


@dataclass(slots=True)
class Piece:
    """What became known since the last piece."""

    text: str = ""
    wave_S: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    logprobs: list[Logprob] = field(default_factory=list)


class StopFilter:
    """Lets text through up to the first stop word; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._waiting = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is certain."""
        if self.stopped:
            return ""
        self._waiting += text
        places = [place for place in (self._waiting.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped = True
            out, self._waiting = self._waiting[: min(places)], ""
            return out
        keep = max((_overlap(self._waiting, stop) for stop in self._stops), default=0)
        out, self._waiting = self._waiting[: len(self._waiting) - keep], self._waiting[len(self._waiting) - keep :]
        return out

    def flush(self) -> str:
        """What waited in vain."""
        out, self._waiting = self._waiting, ""
        return out


class ChatTurn:
    """Generates one answer; its counts are whole when :meth:`pieces` has ended."""

    def __init__(
        self, stages: Stages, tokenizer: Tokenizer, session: str, stops: Sequence[str], alternatives: int
    ) -> None:
        self._stages, self._session, self._alternatives = stages, session, alternatives
        self._text, self._frames, self._stop = TextReader(tokenizer), FrameReader(), StopFilter(stops)
        self._eos = tokenizer.eos_id
        self._ended_words = False
        self._decoder = Voice(session, 0)
        self.finished = False
        self.text_rows = 0
        self.audio_rows = 0

    @property
    def finish_reason(self) -> str:
        """``stop`` or ``length``."""
        return "stop" if self.finished or self._stop.stopped else "length"

    async def pieces(self, prompt: Prompt, speaks: bool) -> AsyncIterator[Piece]:
        """The answer to a prompt, piece by piece.

        Raises:
            ApiError: a stage failed or is full.
        """
        rows = await _rows(self._stages, prompt)
        options = AnswerOptions(
            voice=prompt.rows.voice,
            max_tokens=prompt.rows.max_tokens,
            temperature=prompt.rows.temperature,
            seed=prompt.rows.seed,
            logprobs=self._alternatives,
        )
        try:
            async with aclosing(answer_alone(self._stages, self._session, rows, options)) as parts:  # type: ignore[type-var]
                async for part in parts:
                    piece = Piece()
                    codes: list[NDArray[np.int64]] = []
                    for number, row_5 in enumerate(part.ids_R5):
                        self._row(row_5, piece, codes)
                        if part.logprobs and not self._ended_words:
                            chosen, best = part.logprobs[number]
                            piece.logprobs.append((int(row_5[0]), chosen, best))
                    self.finished = self.finished or part.ended
                    if speaks:
                        piece.wave_S = await self._say(codes, part.ended)
                    yield piece
                    if self._stop.stopped and not speaks:
                        break
            last = Piece(text=self._stop.push(self._text.flush()) + self._stop.flush())
            if speaks and not self.finished:
                last.wave_S = await self._say([], True)
            yield last
        finally:
            self._stages.forget(self._session)

    def _row(self, row_5: NDArray[np.int64], piece: Piece, codes: list[NDArray[np.int64]]) -> None:
        spoken = bool((row_5[1:] != AUDIO_PAD).any())
        self.audio_rows += spoken
        self.text_rows += not spoken
        self._ended_words = self._ended_words or int(row_5[0]) == self._eos
        piece.text += self._stop.push(self._text.push(int(row_5[0])))
        frame = self._frames.push(row_5)
        if frame is not None:
            codes.append(frame)

    async def _say(self, codes: list[NDArray[np.int64]], final: bool) -> NDArray[np.float32]:
        if not codes and not (final and self._decoder.begun):
            return np.zeros(0, np.float32)
        return await self._decoder.say(codes, final, self._stages)


async def _rows(stages: Stages, prompt: Prompt) -> Rows:
    """Prompt rows with the encoders' features."""
    features = []
    for modality in FEATURE_MODALITIES:
        media = prompt.media[modality]
        if media:
            values = await encode(stages, modality, list(media))
            features += list(zip(prompt.rows.offsets[modality], values, strict=True))
    return Rows(ids_T5=prompt.rows.ids_T5, features=tuple(features))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
