"""The watch over the stages: long work is waited for, silence is not, and what went wrong has a name."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from omni_ray.types.modality import Modality
from pipelines.serving.errors import ApiError
from pipelines.serving.stages import AnswerOptions, Rows, SessionLostError

# Raised by ray.serve's own settings classes when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
PATIENCE_S = 0.8
PROXY = "grpc_proxy"
NOTHING = Rows.of_text([5])
Work = Callable[[], Awaitable[Any]]


class Handle:
    """A deployment handle of one replica, in the shape that the gateway uses."""

    def __init__(self, work: Work, alive: bool = True) -> None:
        self.work, self.alive, self.probes = work, alive, 0
        self.ways: list[tuple[str, bool]] = []

    def options(self, *, method_name: str, stream: bool, _by_reference: bool, session_id: str = "") -> Any:
        self.ways.append((method_name, _by_reference))
        return Method(self, method_name, stream)

    @property
    def features(self) -> Any:
        return Method(self, "features", False)


class Method:
    def __init__(self, handle: Handle, name: str, stream: bool) -> None:
        self.handle, self.name, self.stream = handle, name, stream

    def remote(self, *_: Any) -> Any:
        if self.name == "ready":
            return self._ready()
        return Stream(self.handle) if self.stream else self.handle.work()

    async def _ready(self) -> str:
        self.handle.probes += 1
        if not self.handle.alive:
            await asyncio.sleep(60)
        return "ready"


class Stream:
    """Parts of an answer."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.cancelled = handle, False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        return await self.handle.work()

    def cancel(self) -> None:
        self.cancelled = True


def stages_of(work: Work, alive: bool = True) -> tuple[Any, Handle]:
    from pipelines.serving.serve_stages import ServeStages

    handle = Handle(work, alive)
    return ServeStages(PATIENCE_S, **dict.fromkeys(("vision", "audio", "language", "speech"), handle)), handle  # type: ignore[arg-type]


async def long_work() -> str:
    await asyncio.sleep(3 * PATIENCE_S)
    return "done"


async def never() -> None:
    await asyncio.sleep(60)


def failing(error: Exception) -> Work:
    async def work() -> None:
        raise error

    return work


def test_long_work_of_a_living_replica_is_waited_for() -> None:
    stages, handle = stages_of(long_work)
    wave_S = np.zeros(10, np.float32)
    assert asyncio.run(stages.hear("a", 0, 0, wave_S, False)) == "done"
    assert handle.probes >= 2


@pytest.mark.parametrize("call", ["hear", "extend", "say", "encode", "answer"])
def test_a_silent_stage_fails_in_time_and_the_next_call_sooner(call: str) -> None:
    stages, handle = stages_of(never, alive=False)

    async def ask() -> float:
        began = time.monotonic()
        with pytest.raises(ApiError, match="stage failed on this request") as failed:
            await asked(stages, call)
        assert (failed.value.status, failed.value.code) == (503, "stage_failed")
        return time.monotonic() - began

    async def main() -> None:
        first, again = await ask(), await ask()
        assert first >= PATIENCE_S * 0.9
        assert again < first / 2
        handle.alive, handle.work = True, failing(SessionLostError("it works again"))
        with pytest.raises(SessionLostError, match="it works again"):
            await asked(stages, call)

    asyncio.run(main())


async def asked(stages: Any, call: str) -> Any:
    if call == "hear":
        return await stages.hear("a", 0, 0, np.zeros(10, np.float32), False)
    if call == "extend":
        return await stages.extend("a", 0, NOTHING)
    if call == "say":
        return await stages.say("a", 0, 0, np.zeros((1, 4), np.int64), False)
    if call == "encode":
        return await stages.encode(Modality.VISION, [])
    return [part async for part in stages.answer("a", 0, NOTHING, AnswerOptions())]


def errors() -> dict[str, tuple[Exception, type, str]]:
    from ray.exceptions import ActorDiedError, ObjectLostError
    from ray.serve.exceptions import BackPressureError, RayServeException

    return {
        "died": (ActorDiedError(), SessionLostError, "replica is gone"),
        "lost": (ObjectLostError("0" * 56, None, ""), SessionLostError, "replica is gone"),  # type: ignore[arg-type]
        "full": (BackPressureError(num_queued_requests=1, max_queued_requests=1), ApiError, "stage is full"),
        "inside": (RayServeException("inside"), ApiError, "stage failed on this request"),
        "by gRPC": (ValueError("inside"), ApiError, "stage failed on this request"),
        "unknown session": (SessionLostError("a is not here"), SessionLostError, "a is not here"),
        "shut down": (asyncio.CancelledError(), SessionLostError, "replica is gone"),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("error", ["died", "lost", "full", "inside", "by gRPC", "unknown session", "shut down"])
@pytest.mark.parametrize("call", ["hear", "extend", "say", "encode", "answer"])
def test_failures_in_the_words_of_the_gateway(error: str, call: str) -> None:
    raised, seen, words = errors()[error]
    stages, _ = stages_of(failing(raised))
    with pytest.raises(seen, match=words):
        asyncio.run(asked(stages, call))


@pytest.mark.parametrize("call", ["hear", "extend", "say", "encode", "answer"])
def test_a_caller_that_is_cancelled_ends_as_cancelled(call: str) -> None:
    async def main() -> None:
        stages, _ = stages_of(never)
        asking = asyncio.create_task(asked(stages, call))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(main())


async def done() -> None:
    pass


def test_small_calls_go_direct_and_large_ones_through_the_object_store() -> None:
    stages, handle = stages_of(done)
    long_rows = Rows(ids_T5=NOTHING.ids_T5, features=((0, np.zeros((400, 1000), np.float32)),))

    async def main() -> None:
        await stages.extend("a", 0, NOTHING)
        await stages.extend("a", 0, long_rows)
        for frames in (1, 400):
            await stages.say("a", 0, 0, np.zeros((frames, 4), np.int64), False)
        for seconds in (1, 20):
            await stages.hear("a", 0, 0, np.zeros(16000 * seconds, np.float32), False)
        await stages.encode(Modality.VISION, [])
        stages.answer("a", 0, NOTHING, AnswerOptions())
        await stages.part("language", "a", 0, 1)

    asyncio.run(main())
    small_and_large = [(name, large) for name in ("extend", "say", "hear") for large in (False, True)]
    assert handle.ways == [*small_and_large, ("answer", True), ("part", True)], "streams and what is handed on stay"


def test_an_http_proxy_in_the_environment_is_not_asked_for_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROXY, raising=False)
    stages, _ = stages_of(done)
    asyncio.run(stages.extend("a", 0, NOTHING))
    assert os.environ.get(PROXY) == "", "gRPC reads http_proxy where this is not set"
    monkeypatch.setenv(PROXY, "http://chosen:1")
    asyncio.run(stages_of(done)[0].extend("a", 0, NOTHING))
    assert os.environ.get(PROXY) == "http://chosen:1"
