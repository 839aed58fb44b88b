"""What a built tiny world says of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from omni_ray.data.tiny_world.shards import Shard
from omni_ray.types.errors import DataError

MANIFEST_NAME = "manifest.json"
_MEDIA_CODE = ("audio.py", "image.py", "video.py", "tokenizer.py")
_PACKAGES = ("scikit-learn", "hibari-tts", "espeakng-loader", "av", "pillow", "numpy", "soundfile", "tokenizers")

LICENCES: Mapping[str, str] = {
    "handwritten digits (scikit-learn load_digits; UCI, Alpaydin and Kaynak)": "BSD-3-Clause / CC BY 4.0",
    "assistant's voice (hibari-tts, voice heart)": "Apache-2.0",
    "synthetic speakers (espeak-ng through espeakng-loader; called, not bundled)": "GPL-3.0 program, free output",
    "drawings, clips, texts, questions": "Apache-2.0, this project",
}
REAL_LICENCES: Mapping[str, str] = {
    "handwritten-digits (MNIST; LeCun, Cortes, Burges)": "CC BY-SA 3.0",
    "human-digits (Free Spoken Digit Dataset; Jakobovski and speakers)": "CC BY-SA 4.0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A built world; written last, so a folder without it is not whole."""

    inputs: Mapping[str, Any]
    """All that decides the bytes: this code, seed, hold_out, scale, sizes, packages, sha256 of the real files."""
    sources: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """source -> split -> {samples, bytes, shards: [path, sha256, bytes, samples]}."""
    tokenizer: Mapping[str, Any]
    """path, sha256, entries."""
    held_out: Mapping[str, Any]
    """Ids that no component may have been trained on: pairs, glyphs, speakers, recordings, voices."""
    licences: Mapping[str, str]
    """Licence of each origin."""

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(int(split["bytes"]) for source in self.sources.values() for split in source.values())

    def samples(self, source: str, split: str) -> int:
        """How many samples; 0 where there are none."""
        return int(self.sources.get(source, {}).get(split, {}).get("samples", 0))


def gather_inputs(seed: int, hold_out: str, scale: float, real_data: Path | None) -> dict[str, Any]:
    """All that decides the bytes of a build."""
    files = {}
    for pattern in ("human-digits/*.tar", "handwritten-digits/*.gz"):
        for path in sorted(Path(real_data).glob(pattern)) if real_data is not None else []:
            files[f"{path.parent.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    packages = {name: _version(name) for name in _PACKAGES}
    inputs = {"code": _code(), "seed": seed, "hold_out": hold_out, "scale": scale}
    return {**inputs, "packages": packages, "real_files": files}


def describe_split(shards: list[Shard]) -> dict[str, Any]:
    """One split of one source for the manifest."""
    listed = [asdict(shard) for shard in shards]
    return {"samples": sum(s.samples for s in shards), "bytes": sum(s.bytes for s in shards), "shards": listed}


def read_manifest(folder: Path) -> Manifest:
    """Read a built world's manifest.

    Raises:
        DataError: the folder holds no whole world.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{folder} holds no whole tiny world (no {MANIFEST_NAME}); build it first") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); build the tiny world again") from error


def fits(manifest: Manifest, inputs: Mapping[str, Any], folder: Path) -> bool:
    """Whether a built world is what these inputs give and all its files lie there in full size."""
    if dict(manifest.inputs) != json.loads(json.dumps(inputs)):
        return False
    wanted = [shard for source in manifest.sources.values() for split in source.values() for shard in split["shards"]]
    wanted.append(manifest.tokenizer)
    paths = [(Path(folder) / item["path"], int(item["bytes"])) for item in wanted]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write whole or not at all."""
    path = Path(folder) / MANIFEST_NAME
    part = path.with_name(f"{MANIFEST_NAME}.{os.getpid()}.part")
    part.write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True), encoding="utf-8")
    os.replace(part, path)


def _code() -> str:
    """Digest of the files that make the world, so that a changed maker builds anew."""
    here = Path(__file__).parent
    paths = sorted(here.glob("*.py")) + [here.parent / name for name in _MEDIA_CODE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
