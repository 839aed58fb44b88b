"""Published tensor names and files: LongCat-Flash's safetensors layout, both ways, and the checks on reading."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models.tensor_files import SafetensorsFolder, copy_checked, write_safetensors
from omni_ray.types.errors import CheckpointError

MTP_PREFIX = "model.mtp."
_EXPERT_NAME = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One published tensor and the place it lives in."""

    name: str
    """On disk."""
    held: str
    """Parameter or buffer that holds it, perhaps together with others."""
    view: Callable[[Tensor], Tensor]
    """The published tensor as a view of the held one (works on gradients too)."""


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _rows(start: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[start:end]


def _expert(index: int, start: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[index, start:end]


def language_parts(config: LanguageConfig) -> Iterator[Part]:
    """Every published tensor of a language model, in file order (networks.md section 4, checkpoint keys)."""

    def whole(name: str) -> Part:
        return Part(name=name, held=name, view=_whole)

    yield whole("model.embed_tokens.weight")
    for layer in range(config.num_layers):
        yield from _layer_parts(config, f"model.layers.{layer}.")
    yield whole("model.norm.weight")
    if config.mtp_layers:
        yield from _mtp_parts(config)
    if not config.tie_word_embeddings:
        yield whole("lm_head.weight")
    for kind in ("audio_embeddings", "audio_heads"):
        for codebook in range(config.num_codebooks):
            yield whole(f"{kind}.{codebook}.weight")


def _layer_parts(config: LanguageConfig, prefix: str) -> Iterator[Part]:
    expert = config.expert_ffn_hidden_size
    for slot in range(2):
        yield from _attention_parts(config, f"{prefix}self_attn.{slot}.")
        yield from _mlp_parts(config, f"{prefix}mlps.{slot}.")
        for kind in ("input_layernorm", "post_attention_layernorm"):
            name = f"{prefix}{kind}.{slot}.weight"
            yield Part(name=name, held=name, view=_whole)
    for kind in ("classifier.weight", "e_score_correction_bias"):
        name = f"{prefix}mlp.router.{kind}"
        yield Part(name=name, held=name, view=_whole)
    experts = f"{prefix}mlp.experts."
    for index in range(config.n_routed_experts):
        fused = f"{experts}gate_up_proj"
        yield Part(name=f"{experts}{index}.gate_proj.weight", held=fused, view=_expert(index, 0, expert))
        yield Part(name=f"{experts}{index}.up_proj.weight", held=fused, view=_expert(index, expert, 2 * expert))
        down = f"{experts}down_proj"
        yield Part(name=f"{experts}{index}.down_proj.weight", held=down, view=_expert(index, 0, config.hidden_size))


def _attention_parts(config: LanguageConfig, prefix: str) -> Iterator[Part]:
    held = f"{prefix}qkv_a_proj.weight"
    start, end = config.q_lora_rank, config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
    yield Part(name=f"{prefix}q_a_proj.weight", held=held, view=_rows(0, start))
    yield Part(name=f"{prefix}kv_a_proj_with_mqa.weight", held=held, view=_rows(start, end))
    for kind in ("q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        yield Part(name=f"{prefix}{kind}.weight", held=f"{prefix}{kind}.weight", view=_whole)


def _mlp_parts(config: LanguageConfig, prefix: str) -> Iterator[Part]:
    inner, held = config.ffn_hidden_size, f"{prefix}gate_up_proj.weight"
    yield Part(name=f"{prefix}gate_proj.weight", held=held, view=_rows(0, inner))
    yield Part(name=f"{prefix}up_proj.weight", held=held, view=_rows(inner, 2 * inner))
    yield Part(name=f"{prefix}down_proj.weight", held=f"{prefix}down_proj.weight", view=_whole)


def _mtp_parts(config: LanguageConfig) -> Iterator[Part]:
    layer = "model.mtp.layers.0."
    for kind in ("eh_proj", "enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm"):
        yield Part(name=f"{layer}{kind}.weight", held=f"{layer}{kind}.weight", view=_whole)
    yield from _attention_parts(config, f"{layer}self_attn.")
    yield from _mlp_parts(config, f"{layer}transformer_layer.mlp.")
    yield Part(name="model.mtp.norm.weight", held="model.mtp.norm.weight", view=_whole)


def published_tensors(model: nn.Module, config: LanguageConfig) -> dict[str, Tensor]:
    """Weights under their published names, as views without gradients."""
    held = held_tensors(model)
    return {part.name: part.view(held[part.held]) for part in language_parts(config)}


def published_gradients(model: nn.Module, config: LanguageConfig) -> dict[str, Tensor]:
    """Gradients of parameters that have one, under the published names."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {p.name: p.view(gradients[p.held]) for p in language_parts(config) if p.held in gradients}


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}


# --- the language model's folder -------------------------------------------------------------------------------------


def save_language(model: nn.Module, config: LanguageConfig, folder: Path, max_shard_bytes: int) -> None:
    """``config.json`` with the published keys, and the weights."""
    tensors = published_tensors(model, config)
    write_safetensors(folder, tensors, max_shard_bytes)
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(published_config(config, dtype), indent=2) + os.linesep)


def load_language(model: nn.Module, config: LanguageConfig, folder: Path) -> None:
    """Fill a model of the folder's config from its files."""
    copy_checked(SafetensorsFolder(folder), published_tensors(model, config), passed_over_by(config))


def passed_over_by(config: LanguageConfig) -> Callable[[str], bool]:
    """Names that may lie in a language model's files although it has no place for them."""
    experts = config.n_routed_experts + config.zero_expert_num

    def passed_over(name: str) -> bool:
        # transformers writes gate and up rows for zero experts too, which nothing reads.
        expert = _EXPERT_NAME.match(name)
        beyond = expert is not None and config.n_routed_experts <= int(expert[1]) < experts
        # The published head repeats the embedding table; a model without the head passes over all of it.
        ahead = f"{MTP_PREFIX}embed_tokens." if config.mtp_layers else MTP_PREFIX
        return beyond or name.startswith(ahead)

    return passed_over


def published_config(config: LanguageConfig, dtype: str = "float32") -> dict[str, Any]:
    """The ``config.json`` of a folder: published keys, and ours for what LongCat-Flash alone does not have."""
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        "dtype": dtype,
        "attention_method": "MLA",
        "attention_bias": False,
        "router_bias": False,
        "hidden_act": "silu",
        "zero_expert_type": "identity",
        # Derived keys that readers want: transformers builds its rotary table from head_dim.
        "head_dim": config.qk_rope_head_dim,
        "num_hidden_layers": 2 * config.num_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **config.model_dump(),
    }


def read_config(folder: Path) -> LanguageConfig:
    """The sizes in a folder's ``config.json``; keys that say nothing about the network are passed over.

    Raises:
        CheckpointError: no config.json, not JSON, of another model type, or a needed size is absent.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give a folder written by save_pretrained") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error
    if raw.get("model_type", "longcat_flash") != "longcat_flash":
        raise CheckpointError(f"{path} has model_type {raw['model_type']!r}; longcat_flash is the one that is read")
    if "rope_theta" not in raw and isinstance(raw.get("rope_parameters"), dict):
        raw["rope_theta"] = raw["rope_parameters"].get("rope_theta")
    if "num_layers" not in raw and "num_hidden_layers" in raw:
        raw["num_layers"] = raw["num_hidden_layers"] // 2
    raw = {key: value for key, value in raw.items() if key in LanguageConfig.model_fields and value is not None}
    absent = sorted(_NEEDED - raw.keys())
    if absent:
        raise CheckpointError(f"{path} lacks {', '.join(absent)}; add the published values")
    raw.setdefault("num_codebooks", 0)
    experts = raw["n_routed_experts"] + raw["zero_expert_num"]
    # The published file names no K_e; the share of FFN experts gives the inferred 8 of 12 at full size.
    raw.setdefault("target_ffn_experts", raw["moe_topk"] * raw["n_routed_experts"] / experts)
    raw["mtp_layers"] = raw.get("mtp_layers", 0)
    return LanguageConfig(**raw)


def read_dtype(folder: Path) -> torch.dtype:
    """Number format of a folder's weights (``dtype``, formerly ``torch_dtype``); fp32 where none is named.

    Raises:
        CheckpointError: a format that is not float32, bfloat16 or float16.
    """
    raw = json.loads((folder / "config.json").read_text())
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise CheckpointError(f"{folder / 'config.json'} has dtype {name!r}; {', '.join(known)} are read")
    return known[name]


_NEEDED = {
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "ffn_hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "zero_expert_num",
    "moe_topk",
    "expert_ffn_hidden_size",
    "routed_scaling_factor",
}
