"""Where the samples of a shard lie: made once, kept beside the shard or in a cache folder, mapped and not loaded."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from omni_ray.data.sources.storage import FileFacts, Storage
from omni_ray.types.errors import DataError, StorageError

INDEX_VERSION = 3
INDEX_SUFFIX = ".omni-index"
BATCH_ROWS = 65_536
"""Rows of an index that are in memory while it is made."""
_HASH_WHOLE_BYTES, _HASH_BLOCK = 256 * 2**20, 2**20
_META = b"omni_ray"
_OPEN_TABLES = 256

Build = Callable[[Storage, str], tuple[pa.Schema, Iterable[pa.RecordBatch]]]
"""Scans a shard: the schema of its index, and its rows in batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard and where its index lies."""

    path: str
    """In its storage."""
    size: int
    """Bytes when it was indexed."""
    digest: str
    """Hash of its bytes: of all of them up to 256 MiB, beyond that of 256 blocks spread over it."""
    samples: int
    """How many it holds."""
    index: str
    """Path of the index, on this machine."""

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.path.rsplit("/", 1)[-1]

    def table(self) -> pa.Table:
        """The index, mapped into memory: only the pages that are read take room."""
        return _mapped(self.index, self.digest)


def open_shard(storage: Storage, path: str, kind: str, build: Build, cache: Path | None) -> Shard:
    """Read the kept index where it still fits the shard, else make and keep it.

    Args:
        kind: Name of the format, part of what must fit.  build: Scans the shard.
        cache: Folder for indexes that cannot lie beside their shard; default ``~/.cache/omni_ray/index``.

    Raises:
        DataError: the shard is not there or cannot be read at all.
    """
    facts = storage.facts(path)
    if facts is None:
        raise DataError(f"{path} is not there; name a folder of shards or a shard")
    stamp = [INDEX_VERSION, kind, facts.size, facts.mtime_ns]
    places = index_places(storage, path, cache)
    for place in places:
        found = _read_kept(place, stamp)
        if found is not None:
            digest, samples = found
            return Shard(path=path, size=facts.size, digest=digest, samples=samples, index=str(place))
    digest = content_digest(storage, path, facts)
    for place in places:
        if _keep(place, storage, path, build, {"stamp": stamp, "digest": digest}):
            found = _read_kept(place, stamp)
            if found is not None:
                return Shard(path=path, size=facts.size, digest=digest, samples=found[1], index=str(place))
    raise DataError(
        f"no index of {path} can be kept: neither {places[0].parent} nor {places[-1].parent} can be written"
    )


def index_places(storage: Storage, path: str, cache: Path | None) -> list[Path]:
    """Where the index of a shard may lie, best first."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni_ray" / "index"
    identity = f"{storage.filesystem.type_name}:{os.path.realpath(path) if storage.is_local else path}"
    cached = (cache or default) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}{INDEX_SUFFIX}"
    return [Path(path + INDEX_SUFFIX), cached] if storage.is_local else [cached]


def content_digest(storage: Storage, path: str, facts: FileFacts) -> str:
    """Hash of a file's bytes, of evenly spread blocks where it is large."""
    digest = hashlib.blake2b(str(facts.size).encode(), digest_size=16)
    blocks = max(1, min(256, -(-facts.size // _HASH_BLOCK)))
    if facts.size <= _HASH_WHOLE_BYTES:
        starts = [i * _HASH_BLOCK for i in range(blocks)]
    else:
        starts = [(facts.size - _HASH_BLOCK) * i // (blocks - 1) for i in range(blocks)]
    with storage.open(path) as stream:
        for start in starts:
            digest.update(stream.read_at(min(_HASH_BLOCK, max(0, facts.size - start)), start))
    return digest.hexdigest()


def _read_kept(place: Path, stamp: list[object]) -> tuple[str, int] | None:
    """(digest, samples) of a kept index that fits; None where there is none, or a damaged or outdated one."""
    try:
        with pa.OSFile(str(place)) as stream:
            reader = pa.ipc.open_file(stream)
            meta = json.loads((reader.schema.metadata or {}).get(_META, b"{}"))
            if meta.get("stamp") != stamp:
                return None
        return str(meta["digest"]), _mapped(str(place), str(meta["digest"])).num_rows
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def _keep(place: Path, storage: Storage, path: str, build: Build, meta: dict[str, object]) -> bool:
    """Write whole or not at all; several processes may do it at once. False where the place cannot be written."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".part")
        os.close(handle)
    except OSError:
        return False
    try:
        schema, batches = build(storage, path)
        schema = schema.with_metadata({_META: json.dumps(meta).encode()})
        try:
            with pa.OSFile(part, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in _scanned(batches, path):
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            os.replace(part, place)
        except OSError:
            return False
    finally:
        Path(part).unlink(missing_ok=True)
    return True


def _scanned(batches: Iterable[pa.RecordBatch], path: str) -> Iterator[pa.RecordBatch]:
    """The same; a shard that cannot be read is not taken for a folder that cannot be written."""
    try:
        yield from batches
    except OSError as error:
        raise StorageError(f"{path} could not be read ({error}); look at the disk or the connection") from error


@lru_cache(maxsize=_OPEN_TABLES)
def _mapped(place: str, digest: str) -> pa.Table:
    """The table of an index file; ``digest`` only tells an index from the one that stood there before."""
    return pa.ipc.open_file(pa.memory_map(place)).read_all()


def batches_of(schema: pa.Schema, rows: Iterable[Mapping[str, object]]) -> Iterable[pa.RecordBatch]:
    """Rows as record batches of at most :data:`BATCH_ROWS`."""
    block: list[Mapping[str, object]] = []
    for row in rows:
        block.append(row)
        if len(block) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(block, schema=schema)
            block = []
    if block:
        yield pa.RecordBatch.from_pylist(block, schema=schema)
