"""The built world: equal bytes, whole or absent, splits apart, every sample usable."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_ray.config.model import model_preset
from omni_ray.data.chat import encode_sample, loss_counts
from omni_ray.data.inspect import inspect
from omni_ray.data.sources import WebDatasetSource
from omni_ray.data.tiny_world import build
from omni_ray.data.tiny_world.build import SOURCES, build_tiny_world
from omni_ray.data.tiny_world.manifest import Manifest, read_manifest
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, is_held_out
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.errors import DataError

SCALE = 0.01
MODEL = model_preset("tiny")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real-data folder with two speakers of two digits, without pictures."""
    root = tmp_path_factory.mktemp("real")
    (root / "human-digits").mkdir()
    for speaker in ("anna", "bert"):
        with tarfile.open(root / "human-digits" / f"{speaker}.tar", "w") as tar:
            for digit in (3, 8):
                out = io.BytesIO()
                wave = np.sin(np.arange(4000) / (5 + digit)).astype(np.float32)
                soundfile.write(out, wave, 8000, format="WAV")
                info = tarfile.TarInfo(f"{digit}_{speaker}_0.wav")
                info.size = len(out.getvalue())
                tar.addfile(info, io.BytesIO(out.getvalue()))
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, people: Path) -> Path:
    out = tmp_path_factory.mktemp("world")
    build_tiny_world(out, real_data=people, hold_out="bert", scale=SCALE)
    return out


def _files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".index.json")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_equal_arguments_give_equal_bytes(world: Path, people: Path, tmp_path: Path) -> None:
    build_tiny_world(tmp_path, real_data=people, hold_out="bert", scale=SCALE)
    assert _files(tmp_path) == _files(world)


def test_the_manifest_tells_the_truth(world: Path) -> None:
    manifest, files = read_manifest(world), _files(world)
    shards = [s for source in manifest.sources.values() for split in source.values() for s in split["shards"]]
    assert {s["path"]: s["sha256"] for s in shards} | {"tokenizer.json": manifest.tokenizer["sha256"]} == {
        path: digest for path, digest in files.items() if path != "manifest.json"
    }
    assert manifest.bytes == sum((world / s["path"]).stat().st_size for s in shards)
    assert manifest.samples("audio_human", "train") == manifest.samples("audio_human", "held_out") == 2
    assert manifest.held_out["speakers"] == ["bert"]
    assert any("Free Spoken Digit" in origin for origin in manifest.licences)
    assert set(manifest.sources) == set(SOURCES)


def test_a_whole_world_is_left_alone(
    world: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Manifest:
        raise AssertionError("built again")

    monkeypatch.setattr(build, "_build_aside", stop)
    found = build_tiny_world(world, real_data=people, hold_out="bert", scale=SCALE)
    assert found == read_manifest(world)
    with pytest.raises(AssertionError, match="built again"):
        build_tiny_world(world, real_data=people, hold_out="bert", scale=SCALE, seed=1)
    assert read_manifest(world) == found, "a build that failed leaves the old world whole"
    assert not list(world.glob(".building-*"))
    shard = world / "text" / "train-00000.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-512])
    with pytest.raises(AssertionError, match="built again"):
        build_tiny_world(world, real_data=people, hold_out="bert", scale=SCALE)
    shard.write_bytes(raw)


def test_every_sample_can_be_learnt(world: Path) -> None:
    tokenizer = Tokenizer.load(world / "tokenizer.json")
    for name, splits in read_manifest(world).sources.items():
        for split, told in splits.items():
            source = WebDatasetSource(world / name, name, split=split)
            assert len(source) == told["samples"]
            for sample in source:
                encoded = encode_sample(sample, tokenizer, MODEL)
                assert sum(loss_counts(encoded).values()) > 0
                assert len(encoded) <= 110
                if sample.kind != "text":
                    last = sample.messages[-1]
                    assert last["role"] == ("voice" if sample.facts.get("aloud") else "assistant")
                    assert "".join(part["text"] for part in last["content"]) == sample.facts["answer"]


def test_training_never_tells_a_held_out_pair(world: Path) -> None:
    seen, held = set(), read_manifest(world).held_out
    for name in SOURCES:
        for sample in WebDatasetSource(world / name, name):
            # A spoken answer's words stand in parts of their own; joined, they are told like any text.
            texts = ["".join(part.get("text", "") for part in message["content"]) for message in sample.messages]
            words = "\n".join([*texts, str(sample.facts.get("answer", ""))])
            pairs = {(c, d) for c in COLOURS for d in range(10) if f"{c} {DIGITS[d]}" in words}
            pairs |= {(c, d) for c in COLOURS for d in range(10) if f"the {DIGITS[d]} is {c}" in words}
            assert not any(is_held_out(*pair) for pair in pairs), words
            seen |= pairs
            facts = sample.facts
            assert not {facts.get("glyph"), *facts.get("glyphs", ())} & set(held["glyphs"])
            assert facts.get("voice") not in held["voices"]
            assert facts.get("speaker") not in held["speakers"]
    assert len(seen) > 36


def test_the_held_out_split_judges_the_unseen(world: Path) -> None:
    held = read_manifest(world).held_out
    for name in ("picture", "cross_modal", "video"):
        for sample in WebDatasetSource(world / name, name, split="held_out"):
            assert sample.facts["glyph"] in held["glyphs"]
    for name in ("audio_synthetic", "cross_modal", "audio_repeat"):
        assert all(s.facts["voice"] in held["voices"] for s in WebDatasetSource(world / name, name, split="held_out"))
    assert all(s.facts["combination_held_out"] for s in WebDatasetSource(world / "video", "video", split="held_out"))
    spoken = WebDatasetSource(world / "speech_text", "speech_text", split="held_out")
    assert all(sample.facts["answer"] in held["pairs"] for sample in spoken)


def test_inspect_counts(world: Path) -> None:
    told = inspect(world, Tokenizer.load(world / "tokenizer.json"), MODEL, limit=3)
    assert set(told) == set(SOURCES)
    assert told["picture"]["rows"]["vision"] == 8 * told["picture"]["looked_at"]
    assert told["audio_human"]["rows"]["audio"] == 2 * 6
    assert told["audio_human"]["media_s"] == {"audio": 1.0, "speech": 0.0}
    assert all(not source["bad"] for source in told.values())
    with pytest.raises(DataError, match="holds no other samples"):
        inspect(world, Tokenizer.load(world / "tokenizer.json"), MODEL, split="other")


def test_what_cannot_be_built_is_refused(tmp_path: Path, people: Path) -> None:
    with pytest.raises(DataError, match=r"real-data folder .*nowhere is not there"):
        build_tiny_world(tmp_path / "w", real_data=tmp_path / "nowhere")
    with pytest.raises(DataError, match="no speaker 'carl'"):
        build_tiny_world(tmp_path / "w", real_data=people, hold_out="carl", scale=SCALE)
    assert not list((tmp_path / "w").iterdir()), "nothing half-written stays"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file cannot be written"):
        build_tiny_world(tmp_path / "file", scale=SCALE)
    with pytest.raises(DataError, match="scale is 0"):
        build_tiny_world(tmp_path / "w", scale=0.0)
