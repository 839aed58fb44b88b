"""The three seams; everything else is a plain class. Each has a contract test that every implementation passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omni_ray.types.batch import EmbeddingBatch
from omni_ray.types.sample import Sample

RankId = tuple[str, int]
"""Pool name and rank in it."""
Handle = Any
"""Whatever a transport gives for something sent; opaque to everyone else."""


@runtime_checkable
class Source(Protocol):
    """Numbered samples; random access, so that resuming costs nothing.

    ``source[i]`` raises DataError for a sample that cannot be used, the same one at every read. A source pickles, so
    that it travels to decode tasks.
    """

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def __iter__(self) -> Iterator[Sample]: ...
    def state_dict(self) -> Mapping[str, Any]: ...

    @property
    def fingerprint(self) -> str:
        """Hash of what the numbers stand for: another value when a shard was changed, added or taken away.

        Cheap (names, bytes, index), never a read of the shards; saved with every checkpoint and compared on resume.
        """
        ...


@runtime_checkable
class Transport(Protocol):
    """Moves embedding batches between ranks; the driver holds handles only."""

    def send(self, batch: EmbeddingBatch, to: RankId) -> Handle: ...
    def receive(self, handle: Handle) -> EmbeddingBatch: ...


@runtime_checkable
class Worker(Protocol):
    """Owns one modality's network; held by a training actor, a Serve replica or a plain process."""

    def build(self) -> None: ...
    def forward(self, *args: Any) -> Any: ...
    def backward(self, *args: Any) -> Any: ...
    def step(self, *args: Any) -> Any: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...
