"""Records in text files, media beside them: JSON lines, and one large JSON list (LLaVA)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from omni_ray.data.sources.index import Shard, batches_of
from omni_ray.data.sources.record_format import RecordFormat
from omni_ray.data.sources.records import parse_json, sample_from_record
from omni_ray.data.sources.storage import Storage
from omni_ray.observability.events import emit
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

_SCHEMA = pa.schema([("offset", pa.int64()), ("size", pa.int64())])
_CHUNK = 4 * 2**20
_TOKEN = re.compile(rb'["{}\[\]]')
_STRING_END = re.compile(rb'["\\]')


class TextFormat(RecordFormat):
    """Text of a record at an offset."""

    kind = "text"

    def build(self, storage: Storage, path: str) -> tuple[pa.Schema, Any]:
        return _SCHEMA, batches_of(_SCHEMA, ({"offset": at, "size": size} for at, size in self.scan(storage, path)))

    def scan(self, storage: Storage, path: str) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of every record."""
        raise NotImplementedError

    def sample(self, storage: Storage, shard: Shard, table: pa.Table, row: int) -> Sample:
        offset, size = (table.column(name)[row].as_py() for name in ("offset", "size"))
        if offset + size > shard.size:
            raise DataError(f"its record ends at byte {offset + size} of a file of {shard.size}")
        record = parse_json(storage.read(shard.path, offset, size))
        load = self.media_beside(storage, shard)
        return sample_from_record(self.key(shard, table, row), self.renamed(record), load)


class JsonLinesFormat(TextFormat):
    """One record a line; empty lines are none."""

    kind = "jsonl"

    def scan(self, storage: Storage, path: str) -> Iterator[tuple[int, int]]:
        start = at = 0
        blank = True
        for chunk in _chunks(storage, path):
            place = 0
            while (end := chunk.find(b"\n", place)) >= 0:
                if not (blank and chunk[place:end].isspace()) and (not blank or end > place):
                    yield start, at + end - start
                start, place, blank = at + end + 1, end + 1, True
            blank = blank and not chunk[place:].strip()
            at += len(chunk)
        if not blank:
            yield start, at - start


class JsonListFormat(TextFormat):
    """One JSON list of records; scanned for their ends once, then read at their offsets."""

    kind = "llava"

    def scan(self, storage: Storage, path: str) -> Iterator[tuple[int, int]]:
        depth, start = 0, -1
        for token, at in _tokens(storage, path):
            if token in b"{[":
                depth += 1
                if depth == 1 and token != b"[":
                    raise DataError(f"{path} starts with an object, not a list of records; name it .jsonl, or wrap it")
                start = at if depth == 2 else start
            elif token in b"}]":
                depth -= 1
                if depth == 1:
                    yield start, at + 1 - start
                    start = -1
        if depth:
            emit("shard_cut_short", shard=path)
            if start >= 0:  # the record that is cut: it is counted, and cannot be read
                facts = storage.facts(path)
                yield start, (facts.size if facts else start + 1) - start


def _tokens(storage: Storage, path: str) -> Iterator[tuple[bytes, int]]:
    """Brackets outside strings, with their offsets."""
    at, in_string, skip = 0, False, 0
    for chunk in _chunks(storage, path):
        place, skip = skip, 0
        while True:
            found = (_STRING_END if in_string else _TOKEN).search(chunk, place)
            if found is None:
                break
            token, place = found[0], found.end()
            if in_string and token == b"\\":
                place += 1  # whatever is escaped
                skip = max(0, place - len(chunk))
            elif token == b'"':
                in_string = not in_string
            elif not in_string:
                yield token, at + found.start()
        at += len(chunk)


def _chunks(storage: Storage, path: str) -> Iterator[bytes]:
    with storage.open(path) as stream:
        while chunk := stream.read(_CHUNK):
            yield bytes(chunk)
