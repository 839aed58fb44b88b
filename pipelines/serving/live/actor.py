"""Training actors that answer: what a Serve replica holds around its worker, these hold around the one that trains."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.pool_actor import PoolActor
from actors.transport import pack, unpack
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.observability.spans import span
from pipelines.serving.rooms import AudioRoom, SpeechRoom
from pipelines.serving.session_engine import SessionEngine, Stepped
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError

ROWS_AT_ONCE = 16
"""Rows of one call: an answer is seen as it is made, and a call is over soon."""


class LiveActor(PoolActor):
    """See :class:`actors.pool_actor.PoolActor`; :meth:`look` reads its network and changes nothing that trains."""

    _shown: Any = None

    def look(self, tokenizer: Tokenizer, method: str, *args: Any) -> Any:
        """Ask the network as it is now.

        Args:
            tokenizer: Of the run.  method, args: Of the stage.
        Raises:
            SessionLostError: what the session built was built on earlier weights; it is built again.
        """
        if self._shown is None:
            self._shown = _SHOWN[self.worker.rank.pool](self.worker, tokenizer)
        with span("look", method=method):
            return pack(getattr(self._shown, method)(*unpack(list(args))))

    def look_away(self) -> None:
        """The weights change now: forget what was built on them for those who looked."""
        self._shown = None


class _Vision:
    """Pictures and frame pairs to rows."""

    def __init__(self, worker: Any, _: Tokenizer) -> None:
        self._worker = worker

    def features(self, media: list[Any]) -> list[NDArray[np.float32]]:
        return [rows_ND.float().cpu().numpy() for rows_ND in self._worker.features(media)]


class _Audio(_Vision):
    """Sounds to rows."""

    def __init__(self, worker: Any, tokenizer: Tokenizer) -> None:
        super().__init__(worker, tokenizer)
        self.hear = AudioRoom(worker.network).hear


class _Speech:
    """Codec ids to sound, by a copy on the host where the pool has a GPU: a codec is small, and frozen."""

    def __init__(self, worker: Any, _: Tokenizer) -> None:
        codec = worker.network
        if worker.rank.device != "cpu":
            codec = copy.deepcopy(codec).cpu()
        self.say = SpeechRoom(codec).say


class _Language:
    """Rows to rows."""

    def __init__(self, worker: Any, tokenizer: Tokenizer) -> None:
        worker.build_engine(tokenizer)
        self._sessions = SessionEngine(worker.engine)

    def extend(self, session: str, at: int, rows: Rows) -> None:
        self._sessions.extend(session, at, rows)

    def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> tuple[AnswerRows, bool]:
        self._sessions.start(session, at, rows, options)
        return self.more(session)

    def more(self, session: str) -> tuple[AnswerRows, bool]:
        """The next rows of an answer in progress, and whether there are more to come.

        Raises:
            SessionLostError: none is in progress here.
        """
        made: list[Stepped] = []
        while session in self._sessions.running and len(made) < ROWS_AT_ONCE:
            made += self._sessions.step([session]).values()
        if not made:
            raise SessionLostError("no answer of this session is in progress here")
        part = AnswerRows(
            ids_R5=np.stack([step.row_5.cpu().numpy() for step in made]),
            ended=made[-1].ended,
            logprobs=tuple(step.logprob for step in made if step.logprob is not None),
        )
        return part, session in self._sessions.running


_SHOWN: dict[str, Any] = {"vision": _Vision, "audio": _Audio, "speech": _Speech, "language": _Language}
