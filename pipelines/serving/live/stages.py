"""The stages of a run that trains: rank 0 of every pool, asked while the training waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayError

from actors.pool import Pool
from actors.transport import pack
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.modality import Modality
from pipelines.serving.live.door import Door
from pipelines.serving.serve_stages import failure, unavailable
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows


class LiveStages:
    """See :class:`pipelines.serving.stages.Stages`.  Rows and sound come as fast as they are made."""

    def __init__(self, pools: Mapping[str, Pool], tokenizer: Tokenizer, patience_s: float) -> None:
        """Start.

        Args:
            pools: Those of the run, which puts new ones in when actors were lost.  tokenizer: Of the run.
            patience_s: Longest time of one call; a training does not wait longer for it, either.
        """
        self.door = Door()
        self._pools, self._tokenizer, self._patience_s = pools, tokenizer, patience_s

    def leave(self) -> None:
        """The training goes on: what was built on its weights until now is forgotten."""
        for pool in self._pools.values():
            pool.actors[0].look_away.remote()

    async def encode(self, modality: Modality, media: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """See the protocol."""
        rows: list[NDArray[np.float32]] = await self._ask(modality.value, "features", list(media))
        return rows

    async def hear(self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool) -> Any:
        """See the protocol."""
        return await self._ask("audio", "hear", session, turn, packet, wave_S, final)

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See the protocol."""
        await self._ask("language", "extend", session, at, rows)

    async def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See the protocol; a step between two parts loses the session, which goes on with the new weights."""
        part, going = await self._ask("language", "answer", session, at, rows, options)
        yield part
        while going:
            part, going = await self._ask("language", "more", session)
            yield part

    async def say(self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool) -> Any:
        """See the protocol."""
        return await self._ask("speech", "say", session, answer, first, codes_N4, final)

    def forget(self, session: str) -> None:
        """Nothing to do: what is held for sessions is forgotten with the pause that it was built in."""

    async def ready(self) -> Mapping[str, bool]:
        """Pools that lose an actor are mended by the run; a question waits until then."""
        return dict.fromkeys(self._pools, True)

    async def _ask(self, pool: str, method: str, *args: Any) -> Any:
        async with self.door.entered():
            actor = self._pools[pool].actors[0]
            asked = actor.look.remote(self._tokenizer, method, *pack(list(args)))
            try:
                async with asyncio.timeout(self._patience_s):
                    return await asked
            except TimeoutError:
                raise unavailable(pool) from None
            except RayError as error:
                raise failure(pool, error) from None
