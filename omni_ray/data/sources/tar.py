"""WebDataset tars: members that follow each other under one key are a sample; never unpacked, read at their offsets."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from omni_ray.data.sources.index import Shard, batches_of
from omni_ray.data.sources.records import FILMS, PICTURES, SOUNDS, check_text, parse_json, sample_from_record, utf8
from omni_ray.data.sources.storage import Storage
from omni_ray.observability.events import emit
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

Members = Mapping[str, bytes]
"""Bytes of one sample by extension (everything after the first dot of the member's file name)."""
Adapter = Callable[[str, Members], Sample]
"""Makes a sample of a key and its members."""
CAPTIONS = ("txt", "text", "caption")
_BLOCK = 512
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("names", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
        ("problem", pa.string()),
    ]
)


class TarFormat:
    """Index: a sample's key, its members' extensions, offsets and bytes, and why it cannot be used, if so."""

    kind = "webdataset"

    def __init__(self, adapter: Adapter | None = None) -> None:
        self.adapter = adapter or sample_from_members

    def build(self, storage: Storage, path: str) -> tuple[pa.Schema, Any]:
        return _SCHEMA, batches_of(_SCHEMA, _scan(storage, path))

    def key(self, shard: Shard, table: pa.Table, row: int) -> str:
        return str(table.column("key")[row].as_py())

    def sample(self, storage: Storage, shard: Shard, table: pa.Table, row: int) -> Sample:
        found = table.slice(row, 1).to_pylist()[0]
        if found["problem"] is not None:
            raise DataError(found["problem"])
        ranges = list(zip(found["offsets"], found["sizes"], strict=True))
        for name, (offset, size) in zip(found["names"], ranges, strict=True):
            if offset + size > shard.size:
                there = max(0, shard.size - offset)
                raise DataError(f"member {name} is cut short: {there} of {size} bytes; restore the shard")
        raws = storage.read_all(shard.path, ranges)
        if [len(raw) for raw in raws] != found["sizes"]:
            raise DataError(f"{shard.path} became shorter while it was in use; restore the shard")
        return self.adapter(found["key"], dict(zip(found["names"], raws, strict=True)))


def sample_from_members(key: str, members: Members) -> Sample:
    """Read ``KEY.json`` with a record (see :func:`sample_from_record`), or a medium with a caption beside it.

    Raises:
        DataError: neither form, a json that is damaged or lacks a member, or text that is not UTF-8.
    """

    def load(value: Any, kind: str) -> tuple[str, bytes]:
        media = {name: raw for name, raw in members.items() if name != "json"}
        for name in (str(value), str(value).rsplit("/", 1)[-1].partition(".")[2]):
            if name in media:
                return name, media[name]
        raise DataError(f"member {value} is missing; it has {', '.join(sorted(media)) or 'no media'}")

    if "json" in members:
        record = parse_json(members["json"])
        if not isinstance(record, dict) or "messages" in record or "conversations" in record:
            return sample_from_record(key, record, load)
    return _captioned(key, members)


def _captioned(key: str, members: Members) -> Sample:
    """A picture, sound or film with its caption as the answer; text alone is running text."""
    caption = next((utf8(members[name], name) for name in CAPTIONS if name in members), None)
    if caption is None and "json" in members:
        caption = parse_json(members["json"]).get("caption")
    if not isinstance(caption, str):
        raise DataError(f"members {', '.join(sorted(members))} hold neither messages nor a caption; add KEY.json")
    kinds = (("image", PICTURES), ("audio", SOUNDS), ("video", FILMS))
    parts = [
        {"type": kind, "media": name}
        for name in sorted(members)
        for kind, endings in kinds
        if name.rsplit(".", 1)[-1].lower() in endings
    ]
    text: dict[str, Any] = {"content": [{"type": "text", "text": caption.strip()}]}
    check_text(text)
    if not parts:
        return Sample(key=key, kind="text", messages=({"role": "text"} | text,))
    media = {part["media"]: members[part["media"]] for part in parts}
    messages = ({"role": "user", "content": parts}, {"role": "assistant"} | text)
    return Sample(key=key, kind="caption", messages=messages, media=media)


def _scan(storage: Storage, path: str) -> Iterator[dict[str, object]]:
    """Rows of the index; samples that cannot be used stay in it, so that they are counted and never change numbers."""
    seen: set[str] = set()
    sample: _Sample | None = None
    with storage.open(path) as stream:
        size = stream.size()
        if not size:
            emit("empty_shard", shard=path)
            return
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in _members(tar):
                    if (split := _split(member)) is None:
                        continue
                    key, extension = split
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield sample.row(seen)
                        sample = _Sample(key)
                    sample.add(extension, member)
                end = tar.offset
        except tarfile.TarError as error:
            if sample is None:
                raise DataError(
                    f"{path} cannot be read as an uncompressed tar ({error}); write it with webdataset"
                ) from error
            end = tar.offset
        if sample is None:
            emit("empty_shard", shard=path)
            return
        yield sample.row(seen)
        lost = None if sample.end > size else _lost(stream, path, end, size)  # a member cut short tells by itself
        if lost is not None:
            yield {"key": f"byte-{min(end, size)}", "names": [], "offsets": [], "sizes": [], "problem": lost}


def _lost(stream: Any, path: str, end: int, size: int) -> str | None:
    """Why what follows the last member cannot be found; None where the tar ends as it should, or nearly so."""
    if end < size:
        stream.seek(end)
        damaged = stream.read(_BLOCK).strip(b"\0")
        where = f"damaged at byte {end} of {size}"
        return f"the tar is {where}: what follows cannot be found; restore the shard" if damaged else None
    if size % _BLOCK:
        return f"the tar is cut short at byte {size}: what followed is lost; restore the shard"
    emit("unfinished_shard", shard=path, bytes=size, problem="no end mark: if it was cut short, samples are missing")
    return None


class _Sample:
    """Members that follow each other under one key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: list[tuple[str, int, int]] = []
        self.problem: str | None = None
        self.end = 0
        """Byte after the last of its members."""

    def add(self, extension: str, member: tarfile.TarInfo) -> None:
        if any(extension == known for known, _, _ in self.members):
            self.problem = f"member {extension} stands twice under this key; give every sample its own"
        if ".." in member.name.split("/") or member.name.startswith("/"):
            self.problem = f"member {_clean(member.name)!r} points outside its folder; rename it"
        if not member.isfile() or member.sparse:
            self.problem = f"member {extension} is a link or a special file; store the bytes themselves"
        self.members.append((extension, member.offset_data, member.size))
        self.end = member.offset_data + member.size

    def row(self, seen: set[str]) -> dict[str, object]:
        if self.key in seen:
            self.problem = "its key stands twice in the shard; give every sample its own"
        seen.add(self.key)
        names, offsets, sizes = zip(*self.members, strict=True)
        return {
            "key": self.key,
            "names": list(names),
            "offsets": list(offsets),
            "sizes": list(sizes),
            "problem": self.problem,
        }


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise


def _split(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, extension) of a member; None for folders and files without an extension."""
    folder, _, file_name = member.name.rpartition("/")
    stem, dot, extension = file_name.partition(".")
    if member.isdir() or not stem or not dot:
        return None
    return _clean(f"{folder}/{stem}" if folder else stem), _clean(extension)


def _clean(name: str) -> str:
    """A name as text; tar names may hold any bytes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
