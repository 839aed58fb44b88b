"""Folders in the released layout: names, refusals, foreign keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import SMALL_LANGUAGE

from omni_ray.config.model import model_preset
from omni_ray.models import weights
from omni_ray.models.llm import LanguageModel
from omni_ray.types.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    LanguageModel(SMALL_LANGUAGE, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_tensors(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def test_published_names_and_shapes(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    layer = "model.layers.0."
    want = {
        "model.embed_tokens.weight": (40, 32),
        "lm_head.weight": (40, 32),
        "model.norm.weight": (32,),
        f"{layer}self_attn.1.q_a_proj.weight": (12, 32),
        f"{layer}self_attn.0.kv_a_proj_with_mqa.weight": (12, 32),
        f"{layer}self_attn.0.kv_b_proj.weight": (24, 8),
        f"{layer}mlps.1.up_proj.weight": (24, 32),
        f"{layer}mlp.router.classifier.weight": (5, 32),
        f"{layer}mlp.router.e_score_correction_bias": (5,),
        f"{layer}mlp.experts.2.gate_proj.weight": (10, 32),
        f"{layer}mlp.experts.2.down_proj.weight": (32, 10),
        "audio_embeddings.3.weight": (40, 32),
        "audio_heads.0.weight": (40, 32),
    }
    assert want.items() <= shapes.items()
    assert not any("qkv_a" in name or "gate_up" in name for name in shapes)
    assert sum(t.numel() for t in tensors.values()) == sum(
        t.numel() for t in LanguageModel(SMALL_LANGUAGE).state_dict().values()
    )


def test_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, **{"model.layers.0.mlps.0.up_proj.weight": None})
    with pytest.raises(
        CheckpointError, match=r"lacks tensor model\.layers\.0\.mlps\.0\.up_proj\.weight of shape \[24, 32\]"
    ):
        LanguageModel.from_pretrained(folder)


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    change_tensors(folder, **{"model.norm.weight": torch.zeros(31)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .*: expected shape \[32\], found \[31\]"):
        LanguageModel.from_pretrained(folder)


def test_foreign_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, **{"model.layers.7.norm.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"holds tensor model\.layers\.7\.norm\.weight of shape \[2\]"):
        LanguageModel.from_pretrained(folder)


def test_prediction_heads_and_rows_of_zero_experts_are_passed_over(folder: Path) -> None:
    extra = {
        "model.mtp.norm.weight": torch.zeros(3),
        "model.layers.0.mlp.experts.4.up_proj.weight": torch.zeros(10, 32),
    }
    change_tensors(folder, **extra)
    loaded = LanguageModel.from_pretrained(folder)
    assert torch.equal(
        loaded.model.embed_tokens.weight, LanguageModel(SMALL_LANGUAGE, seed=1).model.embed_tokens.weight
    )


def test_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        LanguageModel.from_pretrained(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    LanguageModel(SMALL_LANGUAGE).save_pretrained(folder, max_shard_bytes=20_000)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is missing though model.safetensors.index.json"):
        LanguageModel.from_pretrained(folder)


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        LanguageModel.from_pretrained(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        LanguageModel.from_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        LanguageModel.from_pretrained(folder)


def test_config_without_our_keys_is_a_text_model(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    for key in ("num_codebooks", "codec_vocab_size", "target_ffn_experts", "rope_theta", "num_layers", "mtp_layers"):
        del raw[key]
    (folder / "config.json").write_text(json.dumps(raw))
    read = weights.read_config(folder)
    assert (read.num_codebooks, read.num_layers, read.rope_theta) == (0, 1, 1e7)
    assert read.target_ffn_experts == pytest.approx(1.2)


def test_bf16_folder_is_loaded_at_its_dtype(tmp_path: Path) -> None:
    LanguageModel(SMALL_LANGUAGE, seed=1).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert loaded.logits(torch.arange(8)[None]).dtype == torch.bfloat16


def test_full_size_counts_parameters_on_meta() -> None:
    config = model_preset("flash-omni").language
    with torch.device("meta"):
        model = LanguageModel(config)
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("audio_"))
    # networks.md section 4: 560 665 M.
    assert round(total / 1e6) == 560_665
