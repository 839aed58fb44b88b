"""Serve deployments around the plain workers: one a modality, each with its own replicas and hardware."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

from actors.placement import actor_options
from actors.pool import make_worker
from actors.transport import pack, unpack
from actors.worker import Rank
from omni_ray.checkpoint.store import check_whole
from omni_ray.config.load import load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.config.serving import ServePool
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.requests import GenerationRequest
from omni_ray.types.modality import Modality
from pipelines.serving.prompt import PromptRows

BATCH_SIZE = 8
"""Most conversations decoded together; a batch is what has arrived while the one before it ran."""
BATCH_WAIT_S = 0.005
QUEUED_PER_REPLICA = 64


def options(pool: ServePool) -> dict[str, Any]:
    """Deployment options of one section ``serving.pools.NAME``: replicas or their range, and the hardware of each."""
    chosen: dict[str, Any] = {
        "ray_actor_options": actor_options(pool.resources),
        "max_ongoing_requests": QUEUED_PER_REPLICA,
        "graceful_shutdown_timeout_s": 5,
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
        self.worker = make_worker(read_recipe(folder), Rank(pool=self.pool))
        self.worker.build(folder / "model" / self.worker.network_name)
        self._one_at_a_time = asyncio.Lock()

    async def ready(self) -> str:
        """Answer; a replica is started only when its network is loaded."""
        return self.pool

    async def _run(self, method: str, *arguments: Any) -> Any:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._call, method, *arguments)

    def _call(self, method: str, *arguments: Any) -> Any:
        return pack(getattr(self.worker, method)(*unpack(list(arguments))))


class VisionReplica(WorkerReplica):
    """Pictures and frame pairs to rows."""

    pool = "vision"

    async def features(self, media: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Rows [n, D] of every item; uint8 frames [1 or 2, h, w, 3] in."""
        return await self._run("features", media)


class AudioReplica(WorkerReplica):
    """Sounds to rows."""

    pool = "audio"

    async def features(self, media: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Rows [n, D] of every item; waves [S] at 16 kHz in."""
        return await self._run("features", media)


class SpeechReplica(WorkerReplica):
    """Codec ids to sound."""

    pool = "speech"

    async def decode(self, codes_N4: NDArray[np.int64]) -> NDArray[np.float32]:
        """Wave [S] at 24 kHz."""
        return await self._run("decode", codes_N4)


class LanguageReplica(WorkerReplica):
    """Prompt rows and features to generated rows, for all that wait together."""

    pool = "language"

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.worker.build_engine(Tokenizer.load(Path(checkpoint) / "tokenizer.json"))

    async def generate(
        self,
        rows: PromptRows,
        vision: list[NDArray[np.float32]] | None,
        audio: list[NDArray[np.float32]] | None,
    ) -> tuple[NDArray[np.int64], bool]:
        """Answer one prompt; ``vision`` and ``audio`` hold the rows of its items, in order.

        Returns:
            [R, 5] generated rows, and whether they ended by themselves.
        """
        return await self._together(_request(rows, {Modality.VISION: vision or (), Modality.AUDIO: audio or ()}))

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _together(self, requests: list[GenerationRequest]) -> list[tuple[NDArray[np.int64], bool]]:
        answers = await asyncio.to_thread(self.worker.generate, requests)
        return [(answer.ids_R5.numpy(), answer.finished) for answer in answers]


def _request(rows: PromptRows, features: Mapping[Modality, Sequence[NDArray[np.float32]]]) -> GenerationRequest:
    placed = [
        (offset, torch.from_numpy(values_ND.copy()))
        for modality, items in features.items()
        for offset, values_ND in zip(rows.offsets[modality], items, strict=True)
    ]
    return GenerationRequest(
        ids_T5=torch.from_numpy(rows.ids_T5.copy()),
        features=tuple(placed),
        voice=rows.voice,
        max_tokens=rows.max_tokens,
        temperature=rows.temperature,
        seed=rows.seed,
    )
