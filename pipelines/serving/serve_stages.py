"""The stages behind Ray Serve: handles, sessions that stick to a replica, failures in the words of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from omni_ray.observability.events import emit
from omni_ray.types.modality import Modality
from pipelines.serving.errors import ApiError, busy
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError

READY_TIMEOUT_S = 5.0


class ServeStages:
    """See :class:`pipelines.serving.stages.Stages`.

    A session's calls carry its name, and the deployments' router sends a name to one replica as long as that lives.
    A replica that does not know the session says so, and the gateway builds it there again.
    """

    def __init__(self, **stages: DeploymentHandle) -> None:
        self._stages = stages
        self._sticky: dict[str, dict[tuple[str, str], Any]] = {}
        self._freeing: set[asyncio.Task[None]] = set()

    async def encode(self, modality: Modality, media: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """See the protocol."""
        found: list[NDArray[np.float32]] = await _stage(modality, self._stages[modality].features.remote(list(media)))
        return found

    async def hear(self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool) -> Any:
        """See the protocol."""
        return await _stage(
            "audio", self._handle("audio", "hear", session).remote(session, turn, packet, wave_S, final)
        )

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See the protocol."""
        await _stage("language", self._handle("language", "extend", session).remote(session, at, rows))

    async def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See the protocol."""
        stream = self._handle("language", "answer", session).remote(session, at, rows, options)
        ended = False
        try:
            async for part in stream:
                yield part
            ended = True
        except BackPressureError:
            raise busy("the language stage is full") from None
        except (RayError, RayServeException) as error:
            raise _failure("language", error) from None
        finally:
            if not ended:
                stream.cancel()

    async def say(self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool) -> Any:
        """See the protocol."""
        return await _stage(
            "speech", self._handle("speech", "say", session).remote(session, answer, first, codes_N4, final)
        )

    def forget(self, session: str) -> None:
        """See the protocol."""
        used = {stage for stage, _ in self._sticky.get(session, {})}
        for stage in used:
            task = asyncio.create_task(self._free(stage, session))
            self._freeing.add(task)
            task.add_done_callback(self._freeing.discard)
        self._sticky.pop(session, None)

    async def ready(self) -> Mapping[str, bool]:
        """Which stages answer within :data:`READY_TIMEOUT_S`."""
        answers = await asyncio.gather(*(self._answers(handle) for handle in self._stages.values()))
        return dict(zip(self._stages, answers, strict=True))

    def _handle(self, stage: str, method: str, session: str) -> Any:
        mine = self._sticky.setdefault(session, {})
        if (stage, method) not in mine:
            mine[stage, method] = self._stages[stage].options(
                method_name=method, session_id=session, stream=method == "answer"
            )
        return mine[stage, method]

    async def _free(self, stage: str, session: str) -> None:
        try:
            await self._stages[stage].options(method_name="forget", session_id=session).remote(session)
        except (RayError, RayServeException) as error:
            emit("session_not_freed", stage=stage, error=type(error).__name__)

    async def _answers(self, handle: DeploymentHandle) -> bool:
        try:
            await asyncio.wait_for(_awaited(handle.ready.remote()), READY_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            return False
        return True


async def _stage(name: str, response: Any) -> Any:
    """Wait for a stage; its failure is one sentence for the client and one event without anyone's words for the log."""
    try:
        return await response
    except BackPressureError:
        raise busy(f"the {name} stage is full") from None
    except (RayError, RayServeException) as error:
        raise _failure(name, error) from None


def _failure(name: str, error: BaseException) -> Exception:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, SessionLostError | ApiError):
        return cause
    emit("stage_failed", stage=name, error=type(error).__name__)
    if type(error).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError"):
        return SessionLostError(f"the {name} replica is gone")
    return ApiError(
        503,
        f"the {name} stage failed on this request; try again, and look at the server's log if it stays",
        code="stage_failed",
        headers={"retry-after": "1"},
    )


async def _awaited(response: Awaitable[Any]) -> Any:
    return await response
