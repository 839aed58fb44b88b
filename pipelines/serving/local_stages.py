"""All stages in one process, without Ray: for tests, and for a look at a model on one machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.inference.omni_model import OmniModel
from omni_ray.types.modality import Modality
from pipelines.serving.language_loop import LanguageLoop
from pipelines.serving.rooms import AudioRoom, SpeechRoom
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows


class LocalStages:
    """See :class:`pipelines.serving.stages.Stages`."""

    def __init__(self, model: OmniModel) -> None:
        self.model = model
        self.ears, self.mouth = AudioRoom(model.audio), SpeechRoom(model.codec)
        self.language = LanguageLoop(SessionEngine(model.engine))
        self._threads = {name: ThreadPoolExecutor(1, name) for name in ("encode", "hear", "say")}

    async def encode(self, modality: Modality, media: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Item by item, so that nobody's rows depend on who else asks."""

        def work() -> list[NDArray[np.float32]]:
            return [self.model.encode(modality, [item])[0].numpy() for item in media]

        return await self._beside("encode", work)

    async def hear(self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool) -> Any:
        """See the protocol."""
        return await self._beside("hear", self.ears.hear, session, turn, packet, wave_S, final)

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See the protocol."""
        await self.language.extend(session, at, rows)

    def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See the protocol."""
        return self.language.answer(session, at, rows, options)

    async def say(self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool) -> Any:
        """See the protocol."""
        return await self._beside("say", self.mouth.say, session, answer, first, codes_N4, final)

    def forget(self, session: str) -> None:
        """See the protocol; behind what runs in each stage already."""
        self._threads["hear"].submit(self.ears.forget, session)
        self._threads["say"].submit(self.mouth.forget, session)
        self.language.forget(session)

    async def ready(self) -> Mapping[str, bool]:
        """One process: here or not."""
        return dict.fromkeys(("vision", "audio", "language", "speech"), True)

    async def close(self) -> None:
        """End the threads."""
        await self.language.stop()
        for pool in self._threads.values():
            pool.shutdown()

    async def _beside(self, name: str, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads[name], call, *arguments)
