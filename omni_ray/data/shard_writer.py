"""Samples of any source written as WebDataset shards: the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from omni_ray.data.sources import FileSource
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written of one source."""

    shards: tuple[str, ...]
    """Names below the folder."""
    sha256: tuple[str, ...]
    """Of their bytes."""
    samples: int
    """How many in all."""
    bad: tuple[str, ...]
    """Samples left out, each with its shard, key and reason."""


def write_source(
    source: FileSource,
    folder: Path,
    *,
    split: str = "train",
    samples_per_shard: int = 1000,
    progress: Callable[[int], object] | None = None,
) -> Written:
    """Copy a source into ``folder/SPLIT-NNNNN.tar``; samples that cannot be read are left out and listed.

    Media keep their bytes; nothing is decoded. A shard appears whole or not at all; memory is one shard at most.

    Raises:
        DataError: the folder cannot be written, or no sample can be read.
    """
    bad: list[str] = []
    names: list[str] = []
    digests: list[str] = []
    total = 0
    block: list[Sample] = []

    def flush() -> None:
        nonlocal total
        name = f"{split}-{len(names):05d}.tar"
        raw = tar_of((f"{split}-{total + i:08d}", sample) for i, sample in enumerate(block))
        _write(folder / name, raw)
        names.append(name)
        digests.append(hashlib.sha256(raw).hexdigest())
        total += len(block)
        block.clear()

    for number in range(len(source)):
        try:
            block.append(source[number])
        except DataError as error:
            bad.append(str(error))
        if len(block) == samples_per_shard:
            flush()
        if progress is not None:
            progress(number + 1)
    if block:
        flush()
    if not total:
        raise DataError(f"not one sample of {source.name} can be read; the first: {bad[0] if bad else 'none there'}")
    return Written(shards=tuple(names), sha256=tuple(digests), samples=total, bad=tuple(bad))


def tar_of(keyed: Iterable[tuple[str, Sample]]) -> bytes:
    """The bytes of a shard; equal samples give equal bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in keyed:
            members = {
                name: f"{place:03d}.{ending(name, raw)}" for place, (name, raw) in enumerate(sample.media.items())
            }
            record = {
                "kind": sample.kind,
                "key": sample.key,
                "messages": [_renamed(message, members) for message in sample.messages],
                "facts": dict(sample.facts),
            }
            text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
            _add(tar, f"{key}.json", text.encode())
            for name, member in members.items():
                _add(tar, f"{key}.{member}", sample.media[name])
    return out.getvalue()


def ending(name: str, raw: bytes) -> str:
    """A file ending for media bytes: by their first bytes, else the name's own."""
    marks = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"))
    for mark, known in marks:
        if raw.startswith(mark):
            return known
    if raw[4:8] == b"ftyp":
        return "mp4"
    if raw[:4] == b"RIFF":
        return "webp" if raw[8:12] == b"WEBP" else "wav"
    own = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    return own if own.isalnum() and own.isascii() and len(own) < 6 else "bin"


def _renamed(message: object, members: dict[str, str]) -> object:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        part | {"media": members[part["media"]]} if isinstance(part, dict) and part.get("media") in members else part
        for part in message["content"]
    ]
    return message | {"content": parts}


def _add(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(raw), 0, 0o644
    tar.addfile(info, io.BytesIO(raw))


def _write(path: Path, raw: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        aside.write_bytes(raw)
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
