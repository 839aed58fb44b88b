"""A worker's state as one object: kept in memory, held for another actor, or written as one rank's shard of files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_ray.balance.dispatch import assign
from omni_ray.training.optimizer import PoolOptimizer
from omni_ray.training.precision import host_copy
from omni_ray.types.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """Everything that a step changes in a worker; each tensor is a copy of its own, in host memory."""

    network: dict[str, Tensor]
    """Parameters (their fp32 masters) and buffers by name."""
    optimizer: dict[str, Tensor]
    """Optimizer state by ``parameter::field``."""
    rope_base: float | None
    """Base of the language model's last stage, which its checkpoints name."""

    @staticmethod
    def of(network: nn.Module, optimizer: PoolOptimizer) -> WorkerState:
        """Copy a worker's state."""
        return WorkerState(
            network={name: host_copy(value) for name, value in optimizer.weights().items()},
            optimizer=optimizer.state_tensors(),
            rope_base=getattr(network, "rope_base", None),
        )

    def copy(self) -> WorkerState:
        """The same state in memory of its own."""
        return WorkerState(
            network={name: value.clone() for name, value in self.network.items()},
            optimizer={name: value.clone() for name, value in self.optimizer.items()},
            rope_base=self.rope_base,
        )

    def restore(self, network: nn.Module, optimizer: PoolOptimizer) -> None:
        """Put the state back."""
        optimizer.load_weights(self.network)
        optimizer.load_state_tensors(self.optimizer)
        if self.rope_base is not None:
            holder: Any = network
            holder.rope_base = self.rope_base


class Snapshots:
    """States by step; the newest confirmed one and those not confirmed yet, so two or three at a time."""

    def __init__(self) -> None:
        self._states: dict[int, WorkerState] = {}

    def keep(self, step: int, state: WorkerState) -> None:
        """Remember a state."""
        self._states[step] = state

    def get(self, step: int) -> WorkerState:
        """The state after ``step`` steps.

        Raises:
            CheckpointError: it was never kept here, or dropped.
        """
        if step not in self._states:
            raise CheckpointError(f"no snapshot of step {step} is in memory; there are {sorted(self._states)}")
        return self._states[step]

    def drop_before(self, step: int) -> None:
        """Forget older ones."""
        self._states = {kept: state for kept, state in self._states.items() if kept >= step}

    def drop_after(self, step: int) -> None:
        """Forget newer ones: they belong to steps that will run again."""
        self._states = {kept: state for kept, state in self._states.items() if kept <= step}


class BackgroundSave:
    """One writing thread beside a worker, so that training goes on while a copy of its state goes to disk."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem = ""

    def start(self, write: Callable[[], None]) -> None:
        """Run ``write`` beside the worker; an earlier one is waited for first."""
        if self._thread is not None:
            self._thread.join()
        self._problem = ""

        def run() -> None:
            try:
                write()
            except Exception as problem:  # told by status(): an error in a thread would be lost
                self._problem = str(problem)

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def status(self, wait: bool) -> str:
        """``writing``, ``done``, or what went wrong."""
        if self._thread is not None and wait:
            self._thread.join()
        if self._thread is not None and self._thread.is_alive():
            return "writing"
        return self._problem or "done"


def write_shard(
    folder: Path,
    name: str,
    rank: int,
    ranks: int,
    network: nn.Module | None,
    optimizer: dict[str, Tensor],
    weights: int | None,
) -> None:
    """Write one rank's part of a pool: rank 0 the published weights, every rank a share of the optimizer state.

    Args:
        network: As it is saved; needed on rank 0 alone.  optimizer, weights: As in :func:`write_optimizer`.

    Raises:
        CheckpointError: the files cannot be written (a full disk, for instance).
    """
    published: Any = network
    try:
        if rank == 0:
            published.save_pretrained(folder / "model" / name)
            for path in (folder / "model" / name).iterdir():
                to_disk(path)
        write_optimizer(folder, name, optimizer, rank, ranks, weights)
    except Exception as problem:  # safetensors raises its own kind on a full disk
        raise CheckpointError(f"{name}, rank {rank}: {folder} could not be written ({problem})") from problem


def write_optimizer(
    folder: Path, name: str, tensors: dict[str, Tensor], rank: int, ranks: int, weight_bytes: int | None
) -> None:
    """One rank's share of the optimizer state, so that all ranks write nearly the same number of bytes.

    Args:
        tensors: The whole state, equal on every rank; or, without ``weight_bytes``, what is this rank's alone.
        weight_bytes: What rank 0 writes besides, the same number on every rank.
    """
    (folder / "optimizer").mkdir(parents=True, exist_ok=True)
    mine = tensors
    if weight_bytes is not None:
        keys = sorted(tensors)
        sizes = [tensors[key].numel() * tensors[key].element_size() for key in keys]
        first, *owners = assign([weight_bytes, *sizes], ranks)
        mine = {key: tensors[key] for key, owner in zip(keys, owners, strict=True) if (owner - first) % ranks == rank}
    path = folder / "optimizer" / optimizer_file(name, rank, ranks)
    save_file(mine, path)
    to_disk(path)


def to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk: a checkpoint takes its name only after that."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


def optimizer_file(name: str, rank: int, ranks: int) -> str:
    """Name of a shard."""
    return f"{name}.safetensors" if ranks == 1 else f"{name}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def load_optimizer(folder: Path, name: str) -> dict[str, Tensor]:
    """The optimizer state of a pool, whatever number of ranks wrote it.

    Raises:
        CheckpointError: a shard is missing or cannot be read.
    """
    whole = folder / "optimizer" / f"{name}.safetensors"
    shards = [whole] if whole.is_file() else sorted((folder / "optimizer").glob(f"{name}-*-of-*.safetensors"))
    expected = 1 if whole.is_file() or not shards else int(shards[0].stem.rsplit("-", 1)[1])
    if len(shards) != expected:
        raise CheckpointError(
            f"{folder}/optimizer holds {len(shards)} of {expected} shards of {name}; use another checkpoint"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            tensors |= load_file(shard)
        except Exception as problem:
            raise CheckpointError(f"{shard} cannot be read ({problem}); use another checkpoint") from problem
    return tensors


def same_state(first: WorkerState, second: WorkerState) -> list[str]:
    """Names of tensors that differ in any bit."""
    ours, theirs = first.network | first.optimizer, second.network | second.optimizer
    names = ours.keys() ^ theirs.keys()
    return sorted(names | {name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])})
