"""Numbered samples of shards: the part that every format shares."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from omni_ray.data.sources.index import Shard, open_shard
from omni_ray.data.sources.storage import Storage
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample


class Format(Protocol):
    """How one kind of shard is indexed and read; small, pickles."""

    kind: str
    """Name in recipes and in kept indexes."""

    def build(self, storage: Storage, path: str) -> tuple[pa.Schema, Any]:
        """Schema and record batches of a shard's index, one row a sample."""
        ...

    def key(self, shard: Shard, table: pa.Table, row: int) -> str:
        """Key of a sample, without reading it."""
        ...

    def sample(self, storage: Storage, shard: Shard, table: pa.Table, row: int) -> Sample:
        """Read one sample.

        Raises:
            DataError: it cannot be used, the same at every read.
            StorageError: its file does not answer.
        """
        ...


class FileSource:
    """Numbered samples of shards on a disk or in an object store.

    Opening reads the kept indexes alone; no file stays open, so a source travels to other processes.
    """

    def __init__(
        self, name: str, storage: Storage, paths: Sequence[str], form: Format, *, cache: Path | None = None
    ) -> None:
        """
        Args:
            name: Name in mixtures and sample references.  paths: Shards, in order.  form: How they are read.

        Raises:
            DataError: a shard cannot be read at all, or there is not one sample.
        """
        self.name = name
        self.storage = storage
        self.form = form
        self._cache = cache
        self.shards = [open_shard(storage, path, form.kind, form.build, cache) for path in paths]
        self._first = [0, *accumulate(shard.samples for shard in self.shards)]
        if not self._first[-1]:
            shown = ", ".join(paths[:3]) or "no shards"
            raise DataError(f"source {name!r} holds no samples ({shown}); build or point to its shards")

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Sample:
        """The sample of a number.

        Raises:
            IndexError: no such number.
            DataError: the sample cannot be used; names shard and key.
            StorageError: its file does not answer.
        """
        shard, row = self.place(index)
        table = self._table(shard)
        try:
            return self.form.sample(self.storage, shard, table, row)
        except DataError as error:
            key = self.form.key(shard, table, row)
            raise type(error)(f"{shard.path}: sample {key}: {error}") from error

    def located(self, index: int, error: DataError) -> DataError:
        """An error about a sample that was read, with the shard that it lies in."""
        return type(error)(f"{self.place(index)[0].path}: {error}")

    def __iter__(self) -> Iterator[Sample]:
        for index in range(len(self)):
            yield self[index]

    def place(self, index: int) -> tuple[Shard, int]:
        """Shard of a number, and the row in it.

        Raises:
            IndexError: no such number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has samples 0..{len(self) - 1}, not {index}")
        place = bisect_right(self._first, index) - 1
        return self.shards[place], index - self._first[place]

    def key(self, index: int) -> str:
        """Key of a sample without reading it."""
        shard, row = self.place(index)
        return self.form.key(shard, self._table(shard), row)

    def state_dict(self) -> Mapping[str, Any]:
        """What the source consists of: shard names, bytes, counts; it does not grow with rows read."""
        shards = [[shard.name, shard.size, shard.samples] for shard in self.shards]
        return {"name": self.name, "length": len(self), "shards": shards, "fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """Hash of the format and of every shard's name, samples and bytes (see :attr:`Shard.digest`)."""
        facts = [(shard.name, shard.samples, shard.digest) for shard in self.shards]
        return hashlib.sha256(repr((self.form.kind, facts)).encode()).hexdigest()[:16]

    def _table(self, shard: Shard) -> pa.Table:
        try:
            return shard.table()
        except (OSError, pa.ArrowException):
            # The source came from another machine, or the index was removed: make it where we are.
            here = open_shard(self.storage, shard.path, self.form.kind, self.form.build, self._cache)
            if (here.digest, here.samples) != (shard.digest, shard.samples):
                raise DataError(f"{shard.path} was changed since the source was opened; open it again") from None
            return here.table()


def same_key(shard: Shard, row: int) -> str:
    """Key of a sample that has no name of its own: the file's, and its number there."""
    return f"{shard.name.rsplit('.', 1)[0]}-{row:08d}"


def read_together(wanted: Sequence[tuple[FileSource, int]]) -> list[Sample | DataError]:
    """Several samples, of any sources, under one deadline; what cannot be used is given as its error.

    Handing every single read to another thread would cost a sample's decoding a fifth more.

    Raises:
        StorageError: their files do not answer.
    """

    def ask() -> list[Sample | DataError]:
        found: list[Sample | DataError] = []
        for source, index in wanted:
            try:
                found.append(source[index])
            except DataError as error:
                found.append(error)
        return found

    if not wanted:
        return []
    names = ", ".join(sorted({source.name for source, _ in wanted}))
    return wanted[0][0].storage.tried(ask, f"one of {len(wanted)} samples of {names}")
