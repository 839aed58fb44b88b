"""The Ray actor around a plain worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.snapshot import WorkerState
from actors.transport import as_tensor, pack, tensor_of, unpack
from actors.worker import Rank
from omni_ray.bridge.chunk import gathered
from omni_ray.config.recipe import Recipe
from omni_ray.observability.spans import Span, SpanTotal, process_recorder, span
from omni_ray.types.batch import EmbeddingBatch
from omni_ray.types.modality import Modality


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
    """A Ray actor around a worker: packs what leaves, unpacks what arrives, notes how long each took.

    Without a recipe it is a spare: a process that has imported torch and waits for a rank to take over.
    """

    def __init__(self, recipe: Recipe | None = None, rank: Rank | None = None) -> None:
        self.worker: Any = None
        self._held: dict[tuple[str, int], WorkerState] = {}
        if recipe is not None and rank is not None:
            self.adopt(recipe, rank)

    def enter(self, phase: str) -> None:
        """Called when a phase begins; for subclasses that watch, or fail on purpose."""

    def adopt(self, recipe: Recipe, rank: Rank) -> None:
        """Become a rank of a pool; its worker is not built yet."""
        self.worker = make_worker(recipe, rank)

    def warm(self) -> int:
        """Import what every worker needs, so that taking over is quick; returns the process id."""
        import actors.audio
        import actors.language
        import actors.speech
        import actors.vision  # noqa: F401

        return os.getpid()

    def where(self) -> tuple[str, str, int]:
        """(node id, its address, process id): the node, so that a snapshot is held on another one."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    def group_address(self) -> str:
        """Where the ranks of this pool can meet."""
        from actors.group import free_address

        return free_address(ray.util.get_node_ip_address())

    def invoke(self, method: str, *args: Any) -> Any:
        """Call a method of the worker; carriers cross as numpy views."""
        self.enter(method)
        with span(method):
            return pack(getattr(self.worker, method)(*unpack(list(args))))

    def encode(self, micro_batch: int, items: Any, returns: int, credit: Any, *media: dict[int, Any]) -> Any:
        """Encoder forward; ``returns`` pieces, each its own object.

        Args:
            credit: Given when the encoder may run this far ahead; its value does not matter.
        """
        self.enter("encode")
        merged = {key: value for part in media for key, value in part.items()}
        with span("encode", micro_batch=micro_batch, items=len(items)):
            pieces = self.worker.forward(micro_batch, items, merged)
        with span("bridge.send", micro_batch=micro_batch, bytes=_bytes(pieces)):
            return _returns([pack(piece) for piece in pieces], returns)

    def encoder_backward(self, micro_batch: int, *pieces: Any) -> None:
        """Encoder backward from the pieces of its gradient."""
        self.enter("encoder_backward")
        with span("bridge.receive", micro_batch=micro_batch):
            arrived = unpack(list(pieces))
        with span("encoder_backward", micro_batch=micro_batch):
            self.worker.backward(micro_batch, arrived)

    def language(
        self, micro_batch: int, payload: Any, layout: Sequence[tuple[Modality, int]], wanted: Any, *pieces: Any
    ) -> Any:
        """Language forward and backward; returns a token (None), then the pieces of every wanted gradient, flat.

        Args:
            payload: (packed OmniBatch, StepContext).  layout: For every sender its modality and number of pieces.
            wanted: Modalities whose encoders train.  pieces: All senders' pieces, one after another.
        """
        from actors.language import chunked

        self.enter("language")
        batch, context = unpack(payload[0]), payload[1]
        features: dict[Modality, list[EmbeddingBatch]] = {}
        start = 0
        with span("bridge.receive", micro_batch=micro_batch):
            for modality, count in layout:
                features.setdefault(modality, []).append(gathered(unpack(list(pieces[start : start + count]))))
                start += count
        with span("language", micro_batch=micro_batch):
            self.worker.forward(micro_batch, batch, context, features, wanted)
            gradients = self.worker.backward(micro_batch)
        chunks = self.worker.recipe.schedule.num_chunks
        back = [piece for gradient in gradients for piece in chunked([gradient], chunks)]
        with span("bridge.send", micro_batch=micro_batch, bytes=_bytes(back)):
            return _returns([None, *(pack(piece) for piece in back)], 1 + len(back))

    def validate(self, payload: Any, vision: Any, audio: Any, codes: Any) -> tuple[float, int]:
        """Cross-entropy of a validation batch; see the language worker."""
        with span("validate"):
            features = [[tensor_of(rows) for rows in part] for part in (vision, audio)]
            result: tuple[float, int] = self.worker.validate((unpack(payload[0]), payload[1]), features, codes)
            return result

    def finish(self, *others: Any) -> float:
        """Close the step's gradient; ``others`` are the packed terms of every rank."""
        import torch

        self.enter("finish")
        with span("finish"):
            return self.worker.finish([(numbers, torch.from_numpy(rows.copy())) for numbers, rows in others])

    def give_pieces(self) -> Any:
        """A sharded pool's terms: a token (None), then one object for every rank."""
        return [None, *self.invoke("give_pieces")]

    def add_pieces(self, *others: Any) -> None:
        """Add this rank's pieces of ranks' terms to its gradient."""
        self.enter("add_pieces")
        with span("add_pieces"):
            self.worker.add_pieces([_pieces(part) for part in others])

    def finish_shard(self, *others: Any) -> Any:
        """Close the gradient of what this rank owns; ``others``: its pieces of every rank's terms."""
        self.enter("finish")
        with span("finish"):
            return self.worker.finish_shard([_pieces(part) for part in others])

    def take_weights(self, *shards: Any) -> None:
        """Take in the other ranks' weights."""
        self.enter("take_weights")
        with span("take_weights"):
            self.worker.take_weights([{name: as_tensor(weight) for name, weight in shard.items()} for shard in shards])

    def save_shard(self, folder: Path, *masters: Any) -> None:
        """Begin to write a sharded rank's part; ``masters``: those of every rank, where the network is written."""
        self.enter("start_saving")
        with span("start_saving"):
            whole = [{name: as_tensor(master) for name, master in shard.items()} for shard in masters]
            self.worker.start_saving(folder, whole)

    def step(self, step: int, *norms_squared: float) -> tuple[float, bool]:
        """The optimizer step, given the squared norm of every training pool."""
        self.enter("step")
        with span("step", step=step):
            return self.worker.step(step, norms_squared)

    def balance(self, step: int, made: tuple[float, bool], *statistics: Any) -> None:
        """Move the expert bias by the counts of all language ranks, if the step was made."""
        import torch

        if made[1]:
            self.worker.balance_experts(step, [torch.from_numpy(counts.copy()) for _, counts in statistics])

    def hold(self, pool: str, step: int, state: Any) -> None:
        """Keep another pool's snapshot in this process, in memory of its own."""
        self.enter("hold")
        self._held[pool, step] = unpack(state).copy()

    def held(self, pool: str, step: int) -> Any:
        """Give a held snapshot back."""
        return pack(self._held[pool, step])

    def drop_held(self, before: int) -> None:
        """Forget held snapshots older than step ``before``."""
        self._held = {key: state for key, state in self._held.items() if key[1] >= before}

    def spans(self) -> tuple[tuple[Span, ...], dict[str, SpanTotal]]:
        """The newest spans of this process, and the totals of all."""
        return process_recorder().spans(), process_recorder().totals()


def _bytes(pieces: Sequence[EmbeddingBatch]) -> int:
    return sum(piece.values_ID.numel() * piece.values_ID.element_size() for piece in pieces)


def _pieces(packed: Any) -> tuple[Any, list[Any]]:
    numbers, pieces = packed
    return numbers, [as_tensor(piece) for piece in pieces]


def _returns(values: list[Any], count: int) -> Any:
    return values[0] if count == 1 else values
