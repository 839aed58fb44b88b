"""Records in tables: Parquet files, and the Arrow files of Hugging Face ``datasets`` folders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni_ray.data.sources.index import Shard, batches_of
from omni_ray.data.sources.media_files import MediaFiles
from omni_ray.data.sources.record_format import RecordFormat
from omni_ray.data.sources.records import sample_from_record
from omni_ray.data.sources.storage import Storage
from omni_ray.observability.events import emit
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

CACHE_BYTES = 256 * 2**20
"""Decoded row groups and record batches that one process keeps."""
_SCHEMA = pa.schema([("group", pa.int32()), ("row", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])


class TableFormat(RecordFormat):
    """Rows of blocks (row groups, record batches); a block is read whole and kept while memory allows."""

    kind = "table"

    def build(self, storage: Storage, path: str) -> tuple[pa.Schema, Any]:
        rows = (
            {"group": group, "row": row, "offset": offset, "size": size}
            for group, (count, offset, size) in enumerate(self.blocks(storage, path))
            for row in range(count)
        )
        return _SCHEMA, batches_of(_SCHEMA, rows)

    def blocks(self, storage: Storage, path: str) -> Iterator[tuple[int, int, int]]:
        """(rows, offset, bytes in memory) of every block."""
        raise NotImplementedError

    def read_block(self, storage: Storage, shard: Shard, group: int, offset: int, size: int) -> pa.Table:
        """One block."""
        raise NotImplementedError

    def sample(self, storage: Storage, shard: Shard, table: pa.Table, row: int) -> Sample:
        place = table.slice(row, 1).to_pylist()[0]
        block = self._block(storage, shard, place)
        try:
            record = block.slice(place["row"], 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise DataError(f"its text is not UTF-8 (byte {error.start}); write it in UTF-8") from error
        present = {name: value for name, value in self.renamed(record).items() if value is not None}
        load = _TableMedia(present, self.media_beside(storage, shard))
        return sample_from_record(self.key(shard, table, row), present, load)

    def _block(self, storage: Storage, shard: Shard, place: Mapping[str, int]) -> pa.Table:
        kept = _blocks.get((shard.path, shard.digest, place["group"]))
        if kept is not None:
            return kept
        try:
            block = self.read_block(storage, shard, place["group"], place["offset"], place["size"])
        except (pa.ArrowException, EOFError) as error:
            raise DataError(f"block {place['group']} of the file is damaged ({_line(error)})") from error
        _blocks.put((shard.path, shard.digest, place["group"]), block)
        return block


class ParquetFormat(TableFormat):
    """Row groups; small ones (some MB) make random access cheap."""

    kind = "parquet"

    def blocks(self, storage: Storage, path: str) -> Iterator[tuple[int, int, int]]:
        try:
            with storage.open(path) as stream:
                facts = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet ({_line(error)})") from error
        for group in range(facts.num_row_groups):
            info = facts.row_group(group)
            yield info.num_rows, 0, info.total_byte_size

    def read_block(self, storage: Storage, shard: Shard, group: int, offset: int, size: int) -> pa.Table:
        if size > storage.limits.max_bytes:
            raise DataError(
                f"its row group takes {size} bytes, more than {storage.limits.max_bytes}; "
                "write smaller row groups, or shards with `omni-ray data build`"
            )

        def ask() -> pa.Table:
            with storage.filesystem.open_input_file(shard.path) as stream:
                try:
                    return pq.ParquetFile(stream).read_row_group(group, use_threads=False)
                except OSError as error:  # what Arrow calls damage inside a file, too
                    raise pa.ArrowInvalid(str(error)) from error

        return storage.tried(ask, shard.path)


class ArrowFormat(TableFormat):
    """Record batches of an Arrow stream or file (the form of ``datasets`` folders), found by walking its messages.

    On a disk they are mapped: a row costs the pages it lies on, however large its batch is.
    """

    kind = "arrow"

    def blocks(self, storage: Storage, path: str) -> Iterator[tuple[int, int, int]]:
        schema: pa.Schema | None = None
        with storage.open(path) as stream:
            at = _start(stream)
            while (message := _next_message(stream, at, path)) is not None:
                end = stream.tell()
                if message.type == "schema":
                    schema = pa.ipc.read_schema(message)
                elif message.type == "dictionary":
                    raise DataError(f"{path} holds dictionary-encoded columns; write them plain")
                else:
                    yield pa.ipc.read_record_batch(message, schema).num_rows, at, end - at
                at = end

    def read_block(self, storage: Storage, shard: Shard, group: int, offset: int, size: int) -> pa.Table:
        if storage.is_local:
            stream = pa.memory_map(shard.path)
            schema = pa.ipc.read_schema(pa.ipc.read_message(_at(stream, _start(stream))))
            message = pa.ipc.read_message(_at(stream, offset))
        else:
            start = 8 if storage.read(shard.path, 0, 6) == b"ARROW1" else 0
            length = int.from_bytes(storage.read(shard.path, start + 4, 4), "little")
            schema = pa.ipc.read_schema(pa.BufferReader(storage.read(shard.path, start, 8 + length)))
            message = pa.ipc.read_message(pa.BufferReader(storage.read(shard.path, offset, size)))
        return pa.Table.from_batches([pa.ipc.read_record_batch(message, schema)])


class _TableMedia:
    """Media that a row carries in a column ``media`` of (name, bytes), else what :class:`MediaFiles` finds."""

    def __init__(self, record: Mapping[str, Any], files: MediaFiles) -> None:
        own = record.get("media")
        self.own = {m["name"]: m["bytes"] for m in own if isinstance(m, Mapping)} if isinstance(own, list) else {}
        self.files = files

    def __call__(self, value: Any, kind: str) -> tuple[str, bytes]:
        if isinstance(value, str) and self.own.get(value):
            return value, bytes(self.own[value])
        return self.files(value, kind)


class _Blocks:
    """Decoded blocks, the most recent ones, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, name: tuple[str, str, int]) -> pa.Table | None:
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
            return found

    def put(self, name: tuple[str, str, int], block: pa.Table) -> None:
        with self._lock:
            if name in self._kept:
                return
            self._kept[name] = block
            self._bytes += block.nbytes
            while self._bytes > self.most_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


_blocks = _Blocks(CACHE_BYTES)


def _start(stream: Any) -> int:
    return 8 if bytes(stream.read_at(6, 0)) == b"ARROW1" else 0


def _at(stream: Any, offset: int) -> Any:
    stream.seek(offset)
    return stream


def _next_message(stream: Any, at: int, path: str) -> Any:
    """The message at an offset; None at the end. A file cut short ends at its last whole message."""
    size = stream.size()
    head = bytes(stream.read_at(8, at)) if at + 8 <= size else b""
    length = int.from_bytes(head[4:], "little")
    if head[:4] != b"\xff\xff\xff\xff" or length == 0:
        return None
    try:
        return pa.ipc.read_message(_at(stream, at))
    except (pa.ArrowException, OSError, EOFError) as error:
        emit("shard_cut_short", shard=path, byte=at, problem=_line(error))
        return None


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
