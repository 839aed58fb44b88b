"""A handful of made-up samples of every modality and untrained components: enough to train on for a dozen steps."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from omni_ray.config.load import check_recipe
from omni_ray.config.model import model_preset
from omni_ray.config.recipe import Recipe
from omni_ray.data.audio import encode_flac
from omni_ray.data.image import encode_png
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.data.video import encode_mp4
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.vision_encoder import VisionEncoder

NETWORKS = ("language", "vision", "audio")
"""Those that training changes."""
STAGES: list[dict[str, Any]] = [
    {"name": "S0", "steps": 2, "mixture": {"text": 8}, "trainable": ["language"]},
    {"name": "S1", "steps": 2, "mixture": {"text": 4, "speech": 3}, "trainable": ["language", "audio_heads"]},
    {
        "name": "S2",
        "steps": 4,
        "mixture": {"text": 3, "picture": 6, "speech": 2, "audio": 3, "film": 1},
        "trainable": ["language", "audio_heads", "vision", "vision_projector", "audio_projector"],
        "micro_batches": 3,
    },
    {
        "name": "S5",
        "steps": 2,
        "mixture": {"blend": [{"source": "audio", "weight": 3}, {"source": "text", "weight": 1}]},
        "trainable": ["audio", "audio_projector"],
        "micro_batches": 3,
        "seq_len": 96,
        "packing": {"kind": "best_fit", "lookahead": 8},
    },
]


def write_world(root: Path) -> None:
    """Text, picture, audio and speech samples as shards under ``root``."""
    rng = np.random.default_rng(0)
    words = "USER:what digit is it\nASSISTANT: red seven. VOICE ASSISTANT:say blue two"
    Tokenizer.learn([words] * 3).save(root / "tokenizer.json")

    def wave() -> bytes:
        samples = int(rng.integers(8000, 20000))
        return encode_flac((rng.standard_normal(samples) * 0.1).astype(np.float32), 16000)

    def picture() -> bytes:
        return encode_png(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8))

    def film() -> bytes:
        frames = rng.integers(0, 255, (4, 56, 56, 3), dtype=np.uint8)
        return encode_mp4(frames, 2, (rng.standard_normal(24000) * 0.1).astype(np.float32))

    answer = {"role": "assistant", "content": [_text(" red seven")]}
    spoken = {"role": "voice", "content": [{"type": "speech", "media": "0.flac", "text": " blue two"}]}
    texts = ["what digit " + "is it " * int(rng.integers(1, 6)) for _ in range(60)]
    _write(root / "text", [("text_question", [_user(_text(t)), answer], {}) for t in texts])
    question = _text("what digit is it")
    seen = [_user({"type": "image", "media": "0.png"}, question), answer]
    heard = [_user({"type": "audio", "media": "0.flac"}, question), answer]
    _write(root / "picture", [("image_question", seen, {"0.png": picture()}) for _ in range(40)])
    _write(root / "audio", [("audio_question", heard, {"0.flac": wave()}) for _ in range(40)])
    shown = [_user({"type": "video", "media": "0.mp4"}, {"type": "audio", "media": "0.mp4"}, question), answer]
    _write(root / "film", [("film_question", shown, {"0.mp4": film()}) for _ in range(4)])
    said = [_user(_text("say blue two")), spoken]
    _write(root / "speech", [("say", said, {"0.flac": wave()}) for _ in range(20)])
    (root / "manifest.json").write_text("{}")


def write_components(folder: Path, seed: int = 0) -> None:
    """Untrained vision, audio and codec networks, the same at every call with one seed."""
    model = model_preset("tiny")
    torch.manual_seed(seed)
    VisionEncoder(model.vision).save_pretrained(folder / "vision")
    AudioEncoder(model.audio).save_pretrained(folder / "audio")
    Codec(model.codec).save_pretrained(folder / "codec")


def mini_recipe(base: Path, **changes: Any) -> Recipe:
    """A ten-step recipe over the four pools; ``changes`` replace whole sections."""
    names = ("text", "picture", "audio", "speech", "film")
    sources: dict[str, Any] = {name: {"path": "{data}/" + name} for name in names}
    sources["film"]["form"] = "chunked"
    raw: dict[str, Any] = {
        "size": "tiny",
        "components": str(base / "components"),
        "stages": STAGES,
        "checkpoint": {"every_steps": 100},
        "data": {"root": str(base / "world"), "tile_items": 2, "sources": sources},
    }
    return check_recipe(raw | changes)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint by network and published name."""
    found: dict[str, torch.Tensor] = {}
    for name in NETWORKS:
        for path in sorted((checkpoint / "model" / name).glob("*.safetensors")):
            found |= {f"{name}/{key}": value for key, value in load_file(path).items()}
    return found


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits are not the same."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def _user(*parts: Mapping[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def _write(folder: Path, samples: list[tuple[str, list[Any], dict[str, bytes]]]) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for number, (kind, messages, media) in enumerate(samples):
            record = json.dumps({"kind": kind, "messages": messages}).encode()
            for name, raw in {"json": record, **media}.items():
                member = tarfile.TarInfo(f"{folder.name}-{number:04d}.{name}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
