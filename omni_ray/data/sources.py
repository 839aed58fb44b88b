"""WebDataset tars as numbered samples: an index of member offsets, then random access."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

INDEX_VERSION = 1
_INDEX_SUFFIX = ".index.json"
_PICTURES, _SOUNDS, _FILMS = (
    ("png", "jpg", "jpeg", "webp", "bmp"),
    ("wav", "flac", "ogg", "mp3"),
    ("mp4", "mkv", "webm"),
)
_CAPTIONS = ("txt", "text", "caption")

Members = Mapping[str, bytes]
"""Bytes of one sample by extension (everything after the first dot of the member's file name)."""
Adapter = Callable[[str, Members], Sample]
"""Makes a sample of a key and its members."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """Where the samples of one tar lie."""

    path: str
    """The tar."""
    size: int
    """Its bytes when it was indexed."""
    entries: tuple[tuple[str, tuple[tuple[str, int, int], ...]], ...]
    """(key, ((extension, offset, bytes), ...)) in tar order."""


class WebDatasetSource:
    """Numbered samples of WebDataset tars.

    The index of member offsets is made once and kept beside each tar (in ``cache`` where that cannot be written), so
    that opening, resuming and random access cost no scan. No file stays open, so a source travels to other processes.
    """

    def __init__(
        self,
        where: Path | str | Sequence[Path | str],
        name: str,
        *,
        split: str = "train",
        adapter: Adapter | None = None,
        cache: Path | None = None,
    ) -> None:
        """Open tars.

        Args:
            where: A folder (its tars whose names start with ``split``, sorted), one tar, or several.
            name: Name in mixtures and sample references.
            adapter: Makes a :class:`Sample` of members; default :func:`sample_from_members`.
        Raises:
            DataError: no tar there, or one that cannot be read at all.
        """
        self.name = name
        self._adapter = adapter or sample_from_members
        self._shards = [_load_index(path, cache) for path in _tars(where, split)]
        self._first: list[int] = []
        total = 0
        for shard in self._shards:
            self._first.append(total)
            total += len(shard.entries)
        self._length = total

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The sample of a number.

        Raises:
            IndexError: no such number.
            DataError: the sample cannot be read; names shard and key.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name} has samples 0..{self._length - 1}, not {index}")
        place = bisect_right(self._first, index) - 1
        shard = self._shards[place]
        key, members = shard.entries[index - self._first[place]]
        try:
            return self._adapter(key, _read_members(shard, members))
        except DataError as error:
            raise DataError(f"{shard.path}: sample {key}: {error}") from error

    def __iter__(self) -> Iterator[Sample]:
        for index in range(self._length):
            yield self[index]

    def key(self, index: int) -> str:
        """Key of a sample without reading it."""
        place = bisect_right(self._first, index) - 1
        return self._shards[place].entries[index - self._first[place]][0]

    def state_dict(self) -> Mapping[str, Any]:
        """What a resumed run compares: shard names, bytes and counts; it does not grow with rows read."""
        shards = [[Path(shard.path).name, shard.size, len(shard.entries)] for shard in self._shards]
        return {"name": self.name, "length": self._length, "shards": shards}

    @property
    def fingerprint(self) -> str:
        """Hash of shard names, bytes and member tables; a shard of the same size with other members differs, too."""
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(repr((Path(shard.path).name, shard.size, shard.entries)).encode())
        return digest.hexdigest()[:16]


def sample_from_members(key: str, members: Members) -> Sample:
    """Read ``KEY.json`` with ``messages`` (this project's form), or a medium with a caption beside it.

    Raises:
        DataError: neither form, or a json that is damaged or lacks a member.
    """
    if "json" in members:
        record = _parse(members["json"])
        if "messages" in record:
            media = {name: raw for name, raw in members.items() if name != "json"}
            _check_media(record["messages"], media)
            return Sample(
                key=key,
                kind=str(record.get("kind", "unknown")),
                messages=tuple(record["messages"]),
                media=media,
                facts=record.get("facts", {}),
            )
    return _captioned(key, members)


def _captioned(key: str, members: Members) -> Sample:
    """A picture, sound or film with its caption as the answer; text alone is running text."""
    caption = next((members[name].decode("utf-8", "replace") for name in _CAPTIONS if name in members), None)
    if caption is None and "json" in members:
        caption = _parse(members["json"]).get("caption")
    if not isinstance(caption, str):
        raise DataError(f"members {', '.join(sorted(members))} hold neither messages nor a caption; add KEY.json")
    kinds = (("image", _PICTURES), ("audio", _SOUNDS), ("video", _FILMS))
    parts = [
        {"type": kind, "media": name}
        for name in sorted(members)
        for kind, endings in kinds
        if name.rsplit(".", 1)[-1].lower() in endings
    ]
    text: dict[str, Any] = {"content": [{"type": "text", "text": caption.strip()}]}
    if not parts:
        return Sample(key=key, kind="text", messages=({"role": "text"} | text,))
    media = {part["media"]: members[part["media"]] for part in parts}
    messages = ({"role": "user", "content": parts}, {"role": "assistant"} | text)
    return Sample(key=key, kind="caption", messages=messages, media=media)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise DataError(f"its json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"its json is a {type(record).__name__}, not an object with messages")
    return record


def _check_media(messages: Any, media: Members) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError("its messages are not a list of objects")
    for message in messages:
        content = message.get("content", [])
        for part in content if isinstance(content, list) else []:
            wanted = part.get("media") if isinstance(part, dict) else None
            if wanted is not None and wanted not in media:
                raise DataError(f"member {wanted} is missing; it has {', '.join(sorted(media)) or 'no media'}")


def _tars(where: Path | str | Sequence[Path | str], split: str) -> list[Path]:
    paths = [Path(where)] if isinstance(where, str | Path) else [Path(path) for path in where]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(folder.glob(f"{split}*.tar"))
        if not paths:
            there = sorted({re.sub(r"-\d+\.tar$", "", path.name) for path in folder.glob("*.tar")})
            raise DataError(f"{folder} has no {split}*.tar; splits there: {', '.join(there) or 'none'}")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is not there; name a folder of WebDataset tars or a tar")
    return paths


def _load_index(path: Path, cache: Path | None) -> ShardIndex:
    """Read the kept index where it still fits the tar, else make and keep it."""
    stat = path.stat()
    stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    places = [path.with_name(path.name + _INDEX_SUFFIX), _cache_place(path, cache)]
    for place in places:
        try:
            kept = json.loads(place.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(kept, dict) and kept.get("stamp") == stamp:
            entries = tuple((key, tuple((e, o, s) for e, o, s in members)) for key, members in kept["entries"])
            return ShardIndex(path=str(path), size=stat.st_size, entries=entries)
    index = ShardIndex(path=str(path), size=stat.st_size, entries=_scan(path))
    text = json.dumps({"stamp": stamp, "entries": index.entries}, separators=(",", ":"))
    for place in places:
        if _keep(place, text):
            break
    return index


def _cache_place(path: Path, cache: Path | None) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni_ray" / "index"
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    return (cache or default) / f"{digest}{_INDEX_SUFFIX}"


def _keep(place: Path, text: str) -> bool:
    """Write whole or not at all; several processes may do it at once."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(part, place)
    except OSError:
        return False
    return True


def _scan(path: Path) -> tuple[tuple[str, tuple[tuple[str, int, int], ...]], ...]:
    """Group members that follow each other under one key; a tar cut short keeps what its headers tell."""
    entries: list[tuple[str, list[tuple[str, int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.TarError:
                    if not entries:
                        raise
                    break
                if member is None:
                    break
                folder, _, file_name = member.name.rpartition("/")
                stem, dot, extension = file_name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not entries or entries[-1][0] != key:
                    entries.append((key, []))
                entries[-1][1].append((extension, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar ({error}); write it with webdataset") from error
    return tuple((key, tuple(members)) for key, members in entries)


def _read_members(shard: ShardIndex, members: tuple[tuple[str, int, int], ...]) -> dict[str, bytes]:
    found = {}
    try:
        with open(shard.path, "rb") as stream:
            for extension, offset, size in members:
                stream.seek(offset)
                raw = stream.read(size)
                if len(raw) != size:
                    raise DataError(f"member {extension} is cut short: {len(raw)} of {size} bytes; restore the shard")
                found[extension] = raw
    except OSError as error:
        raise DataError(f"the shard cannot be read ({error.strerror})") from error
    return found
