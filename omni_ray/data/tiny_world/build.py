"""Builds the tiny world: coloured, moving, spoken digits as WebDataset shards."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_ray.data.tiny_world import makers_heard, makers_seen, makers_text
from omni_ray.data.tiny_world.clips import ClipBook
from omni_ray.data.tiny_world.corpus import template_texts
from omni_ray.data.tiny_world.manifest import (
    LICENCES,
    MANIFEST_NAME,
    REAL_LICENCES,
    Manifest,
    describe_split,
    fits,
    gather_inputs,
    read_manifest,
    write_manifest,
)
from omni_ray.data.tiny_world.pictures import Glyphs, load_glyphs
from omni_ray.data.tiny_world.shards import write_shards
from omni_ray.data.tiny_world.speech import (
    ASSISTANT_VOICE,
    HELD_OUT_VOICES,
    TRAIN_VOICES,
    HumanDigits,
    load_human_digits,
)
from omni_ray.data.tiny_world.words import pairs, phrase
from omni_ray.data.tiny_world.world import Maker, World
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.errors import DataError

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_ENTRIES = 1024
TRAIN, HELD_OUT = "train", "held_out"
Progress = Callable[[str, int, int], None]
"""Called with (source, done, total) after each source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How much of one source is made."""

    make: Maker
    """Makes the samples."""
    train: int
    """Samples to train on."""
    held_out: int
    """Samples to judge by."""


SOURCES: Mapping[str, Recipe] = {
    "text": Recipe(make=makers_text.text_samples, train=5400, held_out=300),
    "speech_text": Recipe(make=makers_heard.speech_text_samples, train=800, held_out=132),
    "picture": Recipe(make=makers_seen.picture_samples, train=4300, held_out=1200),
    "scene": Recipe(make=makers_seen.scene_samples, train=400, held_out=120),
    "picture_speech": Recipe(make=makers_heard.picture_speech_samples, train=360, held_out=100),
    "video": Recipe(make=makers_seen.video_samples, train=1000, held_out=400),
    "audio_human": Recipe(make=makers_heard.audio_human_samples, train=10**6, held_out=10**6),
    "audio_synthetic": Recipe(make=makers_heard.audio_synthetic_samples, train=860, held_out=150),
    "audio_repeat": Recipe(make=makers_heard.audio_repeat_samples, train=260, held_out=100),
    "cross_modal": Recipe(make=makers_heard.cross_modal_samples, train=600, held_out=250),
    "cross_modal_speech": Recipe(make=makers_heard.cross_modal_speech_samples, train=170, held_out=80),
    "dialogue": Recipe(make=makers_seen.dialogue_samples, train=800, held_out=200),
    "speech_dialogue": Recipe(make=makers_heard.speech_dialogue_samples, train=140, held_out=40),
    "audio_visual": Recipe(make=makers_seen.audio_visual_samples, train=240, held_out=100),
}
"""Every source in building order; ``audio_human`` has one sample per recording, none without real data."""


def build_tiny_world(
    out: Path,
    *,
    real_data: Path | None = None,
    seed: int = 0,
    hold_out: str = "yweweler",
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Manifest:
    """Build the world below ``out``, or do nothing where it already lies there.

    Shards are made aside and moved in; the manifest goes first and comes last, so a folder with one is whole. Equal
    arguments and packages give equal bytes.

    Args:
        real_data: Folder with ``human-digits`` and ``handwritten-digits`` (either may be missing).
        hold_out: The person never heard in training.  scale: Share of each source's samples, for quick looks.
    Raises:
        DataError: a package or real file is missing or damaged, or ``out`` cannot be written.
    """
    if not 0 < scale <= 1:
        raise DataError(f"scale is {scale}; choose a share above 0 and up to 1")
    out, real_data = Path(out), None if real_data is None else Path(real_data)
    if real_data is not None and not real_data.is_dir():
        raise DataError(f"the real-data folder {real_data} is not there; name another or leave it out")
    inputs = gather_inputs(seed, hold_out, scale, real_data)
    inputs["sizes"] = {name: [recipe.train, recipe.held_out] for name, recipe in SOURCES.items()}
    if (out / MANIFEST_NAME).is_file():
        found = _try_read(out)
        if found is not None and fits(found, inputs, out):
            return found
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".building-", dir=out))
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror}); choose another folder") from error
    try:
        manifest = _build_aside(aside, inputs, real_data, progress)
        _move_in(aside, out)
        write_manifest(out, manifest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _build_aside(
    folder: Path, inputs: Mapping[str, Any], real_data: Path | None, progress: Progress | None
) -> Manifest:
    glyphs, human = load_glyphs(real_data), load_human_digits(real_data, inputs["hold_out"])
    worlds = _worlds(glyphs, human)
    sources: dict[str, dict[str, Any]] = {}
    for place, (name, recipe) in enumerate(SOURCES.items()):
        for split, wanted in ((TRAIN, recipe.train), (HELD_OUT, recipe.held_out)):
            count = max(1, round(wanted * inputs["scale"]))
            rng = np.random.default_rng([inputs["seed"], zlib.crc32(f"{name}/{split}".encode())])
            shards = write_shards(folder, name, split, recipe.make(worlds[split], rng, count))
            if shards:
                sources.setdefault(name, {})[split] = describe_split(shards)
        if progress is not None:
            progress(name, place + 1, len(SOURCES))
    return Manifest(
        inputs=inputs,
        sources=sources,
        tokenizer=_write_tokenizer(folder),
        held_out=_held_out_ids(glyphs, human),
        licences={**LICENCES, **(REAL_LICENCES if inputs["real_files"] else {})},
    )


def _worlds(glyphs: Glyphs, human: HumanDigits) -> dict[str, World]:
    clips = ClipBook()
    unseen = {"sklearn": glyphs.held_out_sklearn, "mnist": glyphs.held_out_mnist}
    return {
        TRAIN: World(
            held_out=False,
            glyph_sets={"train": glyphs.train},
            people=human.train,
            voices=(*TRAIN_VOICES, ASSISTANT_VOICE),
            clips=clips,
        ),
        HELD_OUT: World(
            held_out=True,
            glyph_sets={name: found for name, found in unseen.items() if len(found)},
            people=human.held_out,
            voices=HELD_OUT_VOICES,
            clips=clips,
        ),
    }


def _write_tokenizer(folder: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.learn(template_texts(), TOKENIZER_ENTRIES)
    raw = tokenizer.to_json().encode()
    (folder / TOKENIZER_NAME).write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    return {"path": TOKENIZER_NAME, "sha256": digest, "bytes": len(raw), "entries": len(tokenizer)}


def _held_out_ids(glyphs: Glyphs, human: HumanDigits) -> dict[str, Any]:
    return {
        "pairs": [phrase(colour, digit) for colour, digit in pairs(True)],
        "glyphs": [*glyphs.held_out_sklearn.ids, *glyphs.held_out_mnist.ids],
        "speakers": sorted({utterance.speaker for utterance in human.held_out}),
        "recordings": [utterance.id for utterance in human.held_out],
        "voices": [voice.name for voice in HELD_OUT_VOICES],
    }


def _move_in(aside: Path, out: Path) -> None:
    """Replace what an earlier build left; nothing else in ``out`` is touched."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for name in SOURCES:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for made in sorted(aside.iterdir()):
        os.replace(made, out / made.name)


def _try_read(out: Path) -> Manifest | None:
    try:
        return read_manifest(out)
    except DataError:
        return None
