"""The stages behind Ray Serve: handles, sessions that stick to a replica, failures in the words of the gateway."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from omni_ray.observability.events import emit
from omni_ray.types.modality import Modality
from pipelines.serving.errors import ApiError, busy
from pipelines.serving.split import End, Split
from pipelines.serving.stages import AnswerOptions, AnswerRows, Handover, Rows, SessionLostError

READY_TIMEOUT_S = 5.0
FREE_TIMEOUT_S = 30.0
AGAIN = 16
"""Part of the patience that a stage is given which was silent before."""
MOST_BYTES = 1 << 20
"""A call that carries more, there or back, passes Ray's object store; Serve's gRPC takes 4 MiB a message."""
HEARD_BYTES_PER_BYTE, SAID_BYTES_PER_FRAME = 8, 8192
"""Not less than comes back for sound (12.5 rows a second of the widest model) and for a codec frame of 60 ms."""


class ServeStages:
    """See :class:`pipelines.serving.stages.Stages`.

    A session's calls carry its name, and the deployments' router sends a name to one replica as long as that lives.
    A replica that does not know the session says so, and the gateway builds it there again.
    """

    def __init__(self, patience_s: float = 3.0, **stages: DeploymentHandle) -> None:
        """``patience_s``: longest time without a sign of life from a stage; then what was asked of it has failed."""
        self._stages, self._patience_s = stages, patience_s
        self._silent: set[str] = set()
        """Stages that gave no sign of life when they were last asked: nobody waits long for them once more."""
        self._sticky: dict[str, dict[tuple[str, str, bool], Any]] = {}
        self._freeing: set[asyncio.Task[None]] = set()
        self._split = Split(self) if "prefill" in stages else None
        self.on_handover: Callable[[Handover], None] = lambda handed: None
        """Told when a session's rows went from one language stage to the other."""

    async def encode(self, modality: Modality, media: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """See the protocol."""
        response = self._stages[modality].features.remote(list(media))
        found: list[NDArray[np.float32]] = await self._watched(modality, response)
        return found

    async def hear(self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool) -> Any:
        """See the protocol."""
        hear = self._handle("audio", "hear", session, HEARD_BYTES_PER_BYTE * wave_S.nbytes)
        response = hear.remote(session, turn, packet, wave_S, final)
        return await self._watched("audio", response, session)

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See the protocol."""
        if self._split is not None:
            await self._split.extend(session, at, rows)
            return
        extend = self._handle("language", "extend", session, rows.nbytes)
        await self._watched("language", extend.remote(session, at, rows), session)

    def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See the protocol."""
        if self._split is not None:
            return self._split.answer(session, at, rows, options)
        return self._parts(session, self._handle("language", "answer", session).remote(session, at, rows, options))

    async def read(self, session: str, at: int, rows: Rows) -> None:
        """See :class:`pipelines.serving.split.Ends`."""
        extend = self._handle("prefill", "extend", session, rows.nbytes)
        await self._watched("prefill", extend.remote(session, at, rows), session)

    def part(self, end: End, session: str, start: int, stop: int) -> Any:
        """See :class:`pipelines.serving.split.Ends`; a response that Serve hands to the other replica unopened."""
        return self._handle(end, "part", session).remote(session, start, stop)

    async def take(self, session: str, part: Any) -> None:
        """See :class:`pipelines.serving.split.Ends`."""
        handed = await self._watched("prefill", self._handle("prefill", "take", session).remote(session, part), session)
        self.on_handover(handed)

    async def make(self, session: str, part: Any, at: int, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See :class:`pipelines.serving.split.Ends`."""
        stream = self._handle("language", "make", session).remote(session, part, at, options)
        async with aclosing(self._parts(session, stream)) as parts:  # type: ignore[type-var]
            async for made in parts:
                if made.handed is not None:
                    self.on_handover(made.handed)
                yield made

    async def _parts(self, session: str, stream: Any) -> AsyncIterator[AnswerRows]:
        ended = False
        try:
            while (part := await self._watched("language", _next(stream), session)) is not None:
                yield part
            ended = True
        finally:
            if not ended:
                stream.cancel()

    async def say(self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool) -> Any:
        """See the protocol."""
        say = self._handle("speech", "say", session, SAID_BYTES_PER_FRAME * len(codes_N4))
        response = say.remote(session, answer, first, codes_N4, final)
        return await self._watched("speech", response, session)

    def forget(self, session: str) -> None:
        """See the protocol."""
        used = {stage for stage, *_ in self._sticky.get(session, {})}
        for stage in used:
            task = asyncio.create_task(self._free(stage, session))
            self._freeing.add(task)
            task.add_done_callback(self._freeing.discard)
        self._sticky.pop(session, None)
        if self._split is not None:
            self._split.forget(session)

    async def ready(self) -> Mapping[str, bool]:
        """Which stages answer within :data:`READY_TIMEOUT_S`."""
        answers = await asyncio.gather(*(self._answers(name, "", READY_TIMEOUT_S) for name in self._stages))
        return dict(zip(self._stages, answers, strict=True))

    def _handle(self, stage: str, method: str, session: str, carries: int = MOST_BYTES + 1) -> Any:
        """Of one method, for a call that carries so many bytes; those that are streamed or handed on give none."""
        mine, direct = self._sticky.setdefault(session, {}), carries <= MOST_BYTES
        if (stage, method, direct) not in mine:
            stream = method in ("answer", "make")
            mine[stage, method, direct] = bound(self._stages[stage], method, session, stream=stream, direct=direct)
        return mine[stage, method, direct]

    async def _free(self, stage: str, session: str) -> None:
        """Every replica is told: when replicas come or go, a name moves, and the former holder still holds it."""
        try:
            told = self._stages[stage].broadcast("forget", session)
            await told.results_async(timeout_s=FREE_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            emit("session_not_freed", stage=stage, error=type(error).__name__)

    async def _watched(self, name: str, response: Any, session: str = "") -> Any:
        """Wait for a stage, however long it works, as long as the replica that has the session answers in between.

        Raises:
            SessionLostError: the replica is gone.  ApiError: 429, the stage is full; 503, it failed or is silent.
        """
        work = asyncio.ensure_future(_awaited(response))
        try:
            while not (await asyncio.wait({work}, timeout=self._half(name)))[0]:
                probe = asyncio.create_task(self._answers(name, session, self._half(name)))
                try:
                    await asyncio.wait({work, probe}, return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        self._judge(name, probe.result())
                finally:
                    probe.cancel()
            done = await work
            self._silent.discard(name)
            return done
        except BackPressureError:
            raise busy(f"the {name} stage is full") from None
        except Exception as error:
            raise failure(name, error) from None
        finally:
            if not work.done():
                work.cancel()

    def _judge(self, name: str, answered: bool) -> None:
        """Note what a probe found.

        Raises:
            ApiError: 503, nothing.
        """
        if answered:
            self._silent.discard(name)
            return
        self._silent.add(name)
        emit("stage_silent", stage=name)
        raise unavailable(name)

    def _half(self, name: str) -> float:
        """Half the patience with a stage: that of a wait, and that of a probe."""
        return self._patience_s / (AGAIN if name in self._silent else 2)

    async def _answers(self, name: str, session: str, timeout_s: float) -> bool:
        """Whether the replica that has this session answers in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await _awaited(bound(self._stages[name], "ready", session, direct=True).remote())
        except Exception:
            return False
        return True


def bound(
    stage: DeploymentHandle, method: str, session: str = "", *, stream: bool = False, direct: bool = False
) -> Any:
    """The handle for one method of a stage; with a session's name, of the replica that has it.

    ``direct``: by Serve's gRPC between replicas, which takes two thirds of the time of an actor call.
    """
    if direct:
        # Ray keeps its own channels off a proxy for HTTP; Serve's would take one that the environment names.
        os.environ.setdefault("grpc_proxy", "")
    chosen = {"session_id": session} if session else {}
    return stage.options(method_name=method, stream=stream, _by_reference=not direct, **chosen)  # type: ignore[arg-type]


def failure(name: str, error: BaseException) -> Exception:
    """A stage's failure: one sentence for the client, and one event without anyone's words for the log."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, SessionLostError | ApiError):
        return cause
    emit("stage_failed", stage=name, error=type(error).__name__)
    if isinstance(error, _REPLICA_GONE):
        return SessionLostError(f"the {name} replica is gone")
    return unavailable(name)


_REPLICA_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, ReplicaUnavailableError)


def unavailable(name: str) -> ApiError:
    """What a client is told of a stage that failed or is silent."""
    return ApiError(
        503,
        f"the {name} stage failed on this request; try again, and look at the server's log if it stays",
        code="stage_failed",
        headers={"retry-after": "1"},
    )


async def _next(stream: AsyncIterator[Any]) -> Any:
    """The next part, or None after the last."""
    return await anext(stream, None)


async def _awaited(response: Awaitable[Any]) -> Any:
    """What was asked for.

    Raises:
        ReplicaUnavailableError: the replica ended the call as it shut down.  A call by gRPC brings that as a
            ``CancelledError``, which would read as if this task itself were to end.
    """
    try:
        return await response
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ReplicaUnavailableError("that was asked") from None
