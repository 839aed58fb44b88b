"""WebDataset tars with the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from omni_ray.data.tiny_world.world import Draft

SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One written tar."""

    path: str
    """Below the world's folder, for instance ``picture/train-00000.tar``."""
    sha256: str
    """Of its bytes."""
    bytes: int
    """Its size."""
    samples: int
    """Samples in it."""


def write_shards(folder: Path, source: str, split: str, drafts: Iterable[Draft]) -> list[Shard]:
    """Write ``folder/source/split-NNNNN.tar``; keys are ``source-split-number``."""
    (folder / source).mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    numbered = enumerate(drafts)
    while block := list(islice(numbered, SAMPLES_PER_SHARD)):
        path = f"{source}/{split}-{len(shards):05d}.tar"
        raw = _tar_bytes((f"{source}-{split}-{number:06d}", draft) for number, draft in block)
        (folder / path).write_bytes(raw)
        digest = hashlib.sha256(raw).hexdigest()
        shards.append(Shard(path=path, sha256=digest, bytes=len(raw), samples=len(block)))
    return shards


def _tar_bytes(keyed: Iterator[tuple[str, Draft]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, draft in keyed:
            record = {"kind": draft.kind, "messages": draft.messages, "facts": draft.facts}
            _add(tar, f"{key}.json", json.dumps(record, sort_keys=True, separators=(",", ":")).encode())
            for name in sorted(draft.media):
                _add(tar, f"{key}.{name}", draft.media[name])
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    # Owner, time and mode stay at fixed values, so that equal samples are equal bytes.
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(raw), 0, 0o644
    tar.addfile(info, io.BytesIO(raw))
