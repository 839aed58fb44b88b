"""What the gateway asks of the stages; behind it stand Serve handles, or the workers themselves in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.batch import AUDIO_PAD, NUM_CODEBOOKS
from omni_ray.types.errors import RequestError
from omni_ray.types.modality import Modality

# T rows, R generated rows, N codec frames, D model width, S samples


class SessionLostError(RequestError):
    """A stage does not hold what a session built there, because its replica is another one; it is built again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows to append to a session's cache."""

    ids_T5: NDArray[np.int64]
    """Text and codec ids; placeholders where features stand."""
    features: tuple[tuple[int, NDArray[np.float32]], ...] = ()
    """(first row, [n, D]) of every media span."""

    def __len__(self) -> int:
        return int(self.ids_T5.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of ids and features."""
        return int(self.ids_T5.nbytes) + sum(int(values_ND.nbytes) for _, values_ND in self.features)

    def since(self, start: int) -> Rows:
        """The rows from ``start`` on; a feature span may be cut."""
        if start == 0:
            return self
        kept = [
            (max(0, offset - start), values_ND[max(0, start - offset) :])
            for offset, values_ND in self.features
            if offset + len(values_ND) > start
        ]
        return Rows(ids_T5=self.ids_T5[start:], features=tuple(kept))

    @staticmethod
    def of_text(ids: Sequence[int]) -> Rows:
        """Rows of a text id and codec pads."""
        ids_T5 = np.full((len(ids), 1 + NUM_CODEBOOKS), AUDIO_PAD, np.int64)
        ids_T5[:, 0] = ids
        return Rows(ids_T5=ids_T5)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """One after another."""
        starts = np.cumsum([0, *map(len, parts)])
        features = [(int(start) + at, v) for part, start in zip(parts, starts, strict=False) for at, v in part.features]
        empty = np.zeros((0, 1 + NUM_CODEBOOKS), np.int64)
        return Rows(ids_T5=np.concatenate([empty, *[part.ids_T5 for part in parts]]), features=tuple(features))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How to answer."""

    voice: bool = False
    """Words and codec rows."""
    max_tokens: int = 256
    """Most rows."""
    temperature: float = 0.0
    """0: the likeliest."""
    seed: int = 0
    """Of the draws."""
    logprobs: int = -1
    """Alternatives to report beside each text id; -1: no log-probabilities."""
    made_R5: NDArray[np.int64] | None = None
    """Rows of this answer that another replica made; it goes on after them.  ``max_tokens`` counts those to come."""
    burst_rows: int = 1 << 30
    """Rows that may be made at once; further ones come at the rate at which sound is heard."""


@dataclass(frozen=True, slots=True)
class Handover:
    """A session's rows went from one language stage to the other."""

    bytes: int
    seconds: float
    """From when the giving replica began to copy them until the other has them, by the wall clocks of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRows:
    """The next generated rows."""

    ids_R5: NDArray[np.int64]
    """At least one, unless the answer was cut off by its caller."""
    ended: bool = False
    """The last of them ended the answer."""
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = field(default=())
    """Of each row: the chosen text id's, and the likeliest alternatives with theirs."""
    handed: Handover | None = None
    """With the first rows of an answer whose prompt another stage has read."""


class Stages(Protocol):
    """The stages of one conversation; every method may raise :class:`SessionLostError` or ``ApiError``."""

    async def encode(self, modality: Modality, media: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Rows [n, D] of whole media items."""
        ...

    async def hear(self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool) -> Any:
        """Rows [n, D] that a packet of a running sound makes certain.

        ``final`` ends the sound for this answer only: packet ``packet`` may be given again.
        """
        ...

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """Cut a session's cache back to ``at`` rows and append; an answer in progress ends."""
        ...

    def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """As :meth:`extend`, then generate; closing the iterator ends the generation."""
        ...

    async def say(self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool) -> Any:
        """Sound [S] at the codec's rate of the frames from number ``first`` on that are now certain."""
        ...

    def forget(self, session: str) -> None:
        """Free everything of a session, everywhere; nobody waits for it, so that nobody's end can prevent it."""
        ...

    async def ready(self) -> Mapping[str, bool]:
        """Which stages answer."""
        ...
