"""Pools of Ray actors, each holding one plain worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.placement import actor_options, asked, check_fits, pool_config, spoken
from actors.transport import pack, unpack
from actors.worker import Rank
from omni_ray.bridge.chunk import gathered
from omni_ray.config.recipe import Recipe
from omni_ray.types.batch import EmbeddingBatch
from omni_ray.types.errors import ResourceError
from omni_ray.types.modality import Modality

START_TIMEOUT_S = 300
"""Longest wait for actors to be placed and to build their networks; an autoscaler's new node fits into it."""


def make_worker(recipe: Recipe, rank: Rank) -> Any:
    """The plain worker of a pool (not built yet)."""
    if rank.pool == "language":
        from actors.language import LanguageWorker

        return LanguageWorker(recipe, rank)
    if rank.pool == "vision":
        from actors.vision import VisionWorker

        return VisionWorker(recipe, rank)
    if rank.pool == "audio":
        from actors.audio import AudioWorker

        return AudioWorker(recipe, rank)
    from actors.speech import SpeechWorker

    return SpeechWorker(recipe, rank)


class PoolActor:
    """A Ray actor around a worker: packs what leaves, unpacks what arrives, adds nothing of its own."""

    def __init__(self, recipe: Recipe, rank: Rank) -> None:
        self.worker = make_worker(recipe, rank)

    def invoke(self, method: str, *args: Any) -> Any:
        """Call a method of the worker; carriers cross as numpy views."""
        return pack(getattr(self.worker, method)(*unpack(list(args))))

    def encode(self, micro_batch: int, items: Any, returns: int, *media: dict[int, Any]) -> Any:
        """Encoder forward; ``returns`` pieces, each its own object."""
        merged = {key: value for part in media for key, value in part.items()}
        pieces = self.worker.forward(micro_batch, items, merged)
        return _returns([pack(piece) for piece in pieces], returns)

    def encoder_backward(self, micro_batch: int, *pieces: Any) -> None:
        """Encoder backward from the pieces of its gradient."""
        self.worker.backward(micro_batch, unpack(list(pieces)))

    def language(
        self, micro_batch: int, payload: Any, layout: Sequence[tuple[Modality, int]], wanted: Any, *pieces: Any
    ) -> Any:
        """Language forward and backward; returns the pieces of every wanted gradient, flat.

        Args:
            payload: (packed OmniBatch, StepContext).  layout: For every sender its modality and number of pieces.
            wanted: Modalities whose encoders train.  pieces: All senders' pieces, one after another.
        """
        from actors.language import chunked

        batch, context = unpack(payload[0]), payload[1]
        features: dict[Modality, list[EmbeddingBatch]] = {}
        start = 0
        for modality, count in layout:
            features.setdefault(modality, []).append(gathered(unpack(list(pieces[start : start + count]))))
            start += count
        self.worker.forward(micro_batch, batch, context, features, wanted)
        gradients = self.worker.backward(micro_batch)
        chunks = self.worker.recipe.schedule.num_chunks
        out = [pack(piece) for gradient in gradients for piece in chunked([gradient], chunks)]
        return _returns(out or [None], max(1, len(out)))

    def validate(self, payload: Any, vision: Any, audio: Any, codes: Any) -> tuple[float, int]:
        """Cross-entropy of a validation batch; see the language worker."""
        result: tuple[float, int] = self.worker.validate((unpack(payload[0]), payload[1]), (vision, audio), codes)
        return result

    def finish(self, *others: Any) -> float:
        """Close the step's gradient; ``others`` are the packed terms of every rank."""
        import torch

        return self.worker.finish([(numbers, torch.from_numpy(rows.copy())) for numbers, rows in others])

    def step(self, step: int, *norms_squared: float) -> tuple[float, bool]:
        """The optimizer step, given the squared norm of every training pool."""
        return self.worker.step(step, norms_squared)

    def balance(self, step: int, *statistics: Any) -> None:
        """Move the expert bias by the counts of all language ranks."""
        import torch

        self.worker.balance_experts(step, [torch.from_numpy(counts.copy()) for _, counts in statistics])


def _returns(values: list[Any], count: int) -> Any:
    return values[0] if count == 1 else values


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The actors of one modality."""

    name: str
    """language, vision, audio or speech."""
    actors: tuple[Any, ...]
    """Ray actor handles by rank."""

    def __len__(self) -> int:
        return len(self.actors)

    def all(self, method: str, *args: Any) -> list[Any]:
        """Submit a worker method on every rank; returns the handles."""
        return [actor.invoke.remote(method, *args) for actor in self.actors]

    def stop(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)


def start_pools(recipe: Recipe, names: Sequence[str], resume_from: Path | None = None) -> dict[str, Pool]:
    """Start pools and build their workers, from the recipe or from a checkpoint folder.

    Raises:
        ResourceError: the cluster cannot hold them.
    """
    check_fits(recipe)
    pools = {name: _start(recipe, name) for name in names}
    waiting = []
    for pool in pools.values():
        waiting += pool.all("load", resume_from) if resume_from else pool.all("build")
    try:
        ray.get(waiting, timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        for pool in pools.values():
            pool.stop()
        raise ResourceError(
            f"the pools did not start within {START_TIMEOUT_S} s: they ask for {spoken(asked(recipe))}, "
            f"and of the cluster {spoken(ray.available_resources())} is free; "
            "end what holds the rest, or lower pools.*.resources"
        ) from None
    return pools


def _start(recipe: Recipe, name: str) -> Pool:
    config = pool_config(recipe, name)
    remote = ray.remote(PoolActor)
    options = actor_options(
        config.resources
    )  # threads are set by build(); an own runtime_env would cost a process start
    ranks = [Rank(pool=name, rank=rank, ranks=config.actors) for rank in range(config.actors)]
    return Pool(name=name, actors=tuple(remote.options(**options).remote(recipe, rank) for rank in ranks))
