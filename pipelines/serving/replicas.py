"""Serve deployments around the plain workers: one a modality, each with its own replicas and hardware."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve.config import RequestRouterConfig

from actors.placement import actor_options
from actors.pool_actor import make_worker
from actors.transport import pack, unpack
from actors.worker import Rank
from omni_ray.checkpoint.store import check_whole
from omni_ray.config.load import load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.config.serving import ServePool
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.requests import CachePart
from pipelines.serving.census import process_census
from pipelines.serving.desk import Desk
from pipelines.serving.language_loop import LanguageLoop
from pipelines.serving.rooms import AudioRoom, Packet, SpeechRoom
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.stages import AnswerOptions, AnswerRows, Handover, Rows

QUEUED_PER_REPLICA = 64
PACKET_DUE_S = 0.25
"""A packet inside a turn is needed when an answer may begin: after the speculative silence at the earliest."""
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 1.0, 15.0
"""A replica that died is noticed, and started again, within the period; one that hangs after some timeouts."""
STICKY = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
"""Sends a session's name to one replica, and moves few names when replicas come or go."""


def options(pool: ServePool) -> dict[str, Any]:
    """Deployment options of one section ``serving.pools.NAME``: replicas or their range, and the hardware of each."""
    chosen: dict[str, Any] = {
        "ray_actor_options": actor_options(pool.resources),
        "max_ongoing_requests": QUEUED_PER_REPLICA,
        "graceful_shutdown_timeout_s": 5,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "max_surge_percent": pool.surge_percent,
    }
    if pool.max_replicas > pool.replicas:
        chosen["autoscaling_config"] = {
            "min_replicas": pool.replicas,
            "initial_replicas": pool.replicas,
            "max_replicas": pool.max_replicas,
            "target_ongoing_requests": 2,
        }
    else:
        chosen["num_replicas"] = pool.replicas
    return chosen


def sticky(chosen: dict[str, Any]) -> dict[str, Any]:
    """Options of a deployment whose replicas hold sessions."""
    return chosen | {"request_router_config": RequestRouterConfig.model_validate({"request_router_class": STICKY})}


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe of a whole checkpoint.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
    """
    check_whole(checkpoint)
    return load_recipe(str(checkpoint / "recipe.yaml"))


class WorkerReplica:
    """Holds the worker of a pool, built from a checkpoint; its work runs beside the event loop, one call at a time."""

    pool = ""

    def __init__(self, checkpoint: str) -> None:
        folder = Path(checkpoint)
        recipe = read_recipe(folder)
        recipe = recipe.model_copy(update={"pools": recipe.pools.for_serving()})
        self.worker = make_worker(recipe, Rank(pool=self.pool))
        self.worker.build(folder / "model" / self.worker.network_name)
        self._one_at_a_time = asyncio.Lock()
        self.unused_s = recipe.serving.limits.unused_s

    async def ready(self) -> str:
        """Answer; a replica is started only when its network is loaded."""
        return self.pool

    async def census(self) -> dict[str, int]:
        """What this replica holds, for sessions and as a process."""
        return {**self.holds(), **process_census()}

    def holds(self) -> dict[str, int]:
        """Sessions and pages."""
        return {"sessions": 0, "pages": 0}

    async def _run(self, method: str, *arguments: Any) -> Any:
        return await self._alone(self._call, method, *arguments)

    async def _alone(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """In a thread, one call at a time; one whose caller has gone is waited for: it must not write after its end."""
        async with self._one_at_a_time:
            work = asyncio.create_task(asyncio.to_thread(call, *arguments))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait({work})
                raise

    def _call(self, method: str, *arguments: Any) -> Any:
        return pack(getattr(self.worker, method)(*unpack(list(arguments))))


class VisionReplica(WorkerReplica):
    """Pictures and frame pairs to rows; what is asked while others are at work goes through the encoder together."""

    pool = "vision"

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self._desk: Desk[list[Any]] = Desk(functools.partial(self._alone, self._see_together))

    async def features(self, media: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Rows [n, D] of every item; uint8 frames [1 or 2, h, w, 3] in."""
        rows: list[NDArray[np.float32]] = await self._desk.ask(media)
        return rows

    def _see_together(self, asked: Sequence[list[Any]]) -> list[Any]:
        try:
            rows = iter(self._call("features", [picture for media in asked for picture in media]))
        except Exception as error:  # one that cannot be encoded fails by itself, not those beside it
            return [error] if len(asked) == 1 else [self._see_together([media])[0] for media in asked]
        return [[next(rows) for _ in media] for media in asked]


class StreamReplica(WorkerReplica):
    """Holds the running streams of sessions in a room."""

    _room: AudioRoom | SpeechRoom

    async def forget(self, session: str) -> None:
        """Free a session, after what runs for it."""
        async with self._one_at_a_time:
            self._room.forget(session)

    async def held(self) -> int:
        """Sessions held."""
        return len(self._room)

    def holds(self) -> dict[str, int]:
        """Sessions; a stream has no pages."""
        return {"sessions": len(self._room), "pages": 0}

    def check_health(self) -> None:
        """Ray Serve asks every second; streams that nobody has used for long belong to a gateway that is gone."""
        self._room.sweep(self.unused_s)


class AudioReplica(StreamReplica):
    """Sounds to rows, whole or as they are spoken."""

    pool = "audio"

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self._room = room = AudioRoom(self.worker.network)
        self._desk: Desk[Packet] = Desk(functools.partial(self._alone, room.hear_together))

    async def features(self, media: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Rows [n, D] of every item; waves [S] at 16 kHz in."""
        return await self._run("features", media)

    async def hear(
        self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool
    ) -> NDArray[np.float32]:
        """See :meth:`pipelines.serving.rooms.AudioRoom.hear`."""
        piece, time_s = Packet(session, turn, packet, wave_S, final), 0.0 if final else PACKET_DUE_S
        rows_ND: NDArray[np.float32] = await self._desk.ask(piece, session, time_s)
        return rows_ND

    async def forget(self, session: str) -> None:
        """Free a session, after what runs for it."""
        self._desk.forget(session)
        await super().forget(session)


class SpeechReplica(StreamReplica):
    """Codec ids to sound."""

    pool = "speech"

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self._room = self._mouth = SpeechRoom(self.worker.network)

    async def say(
        self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool
    ) -> NDArray[np.float32]:
        """See :meth:`pipelines.serving.rooms.SpeechRoom.say`."""
        wave: NDArray[np.float32] = await self._alone(self._mouth.say, session, answer, first, codes_N4, final)
        return wave


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows of a session on their way to the other language stage."""

    rows: Any
    """A packed :class:`omni_ray.inference.requests.CachePart`."""
    began: float
    """Wall clock."""


class LanguageReplica(WorkerReplica):
    """Rows to rows, for all sessions that it holds together."""

    pool = "language"

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.worker.build_engine(Tokenizer.load(Path(checkpoint) / "tokenizer.json"))
        self._loop = LanguageLoop(SessionEngine(self.worker.engine))

    def holds(self) -> dict[str, int]:
        """Sessions and the pages of their caches."""
        engine = self._loop.engine
        return {"sessions": len(engine), "pages": engine.engine.cache.pages_held}

    def check_health(self) -> None:
        """Ray Serve asks every second; sessions that nobody has used for long belong to a gateway that is gone.

        Raises:
            ResourceError: the thread that owns the engine has ended; the replica is started again.
        """
        self._loop.sweep(self.unused_s)

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        """See :meth:`pipelines.serving.stages.Stages.extend`."""
        await self._loop.extend(session, at, rows)

    async def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """See :meth:`pipelines.serving.stages.Stages.answer`."""
        async with aclosing(self._loop.answer(session, at, rows, options)) as parts:  # type: ignore[type-var]
            async for part in parts:
                yield part

    async def part(self, session: str, start: int, stop: int) -> PackedPart:
        """Rows [start, stop) of a session, for a replica of the other language stage."""
        began = time.time()
        part = await self._loop.part(session, start, stop)
        return PackedPart(pack(part), began)

    async def take(self, session: str, part: PackedPart) -> Handover:
        """Have rows of the other language stage."""
        rows: CachePart = unpack(part.rows)
        await self._loop.take(session, rows)
        return Handover(rows.rows_ATX.nbytes, time.time() - part.began)

    async def make(self, session: str, part: PackedPart, at: int, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        """:meth:`take`, then answer."""
        handed: Handover | None = await self.take(session, part)
        async with aclosing(self.answer(session, at, Rows.of_text([]), options)) as parts:  # type: ignore[type-var]
            async for made in parts:
                yield replace(made, handed=handed)
                handed = None

    async def forget(self, session: str) -> None:
        """Free a session."""
        self._loop.forget(session)

    async def held(self) -> int:
        """Sessions held."""
        return len(self._loop.engine)
