"""The released omni side files: names and settings of the encoders as published, both ways (networks.md section 4).

``.pt`` files are read with weights-only loading, mapped into memory where their form allows it; nothing else in the
package unpickles a file.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.config.model import AudioConfig, VisionConfig
from omni_ray.types.errors import CheckpointError

EMBEDDING_FILE = "language_model_embedding.pt"
EMBEDDING_NAME = "word_embeddings.weight"
VISION_FILES = {"vit.": "vision/vision_model.pt", "projector.": "vision/vision_projector.pt"}
"""Our prefix -> file; behind the prefix the names are the published ones."""
AUDIO_FILES = {"encoder.": "audio/audio_encoder.pt", "projector.": "audio/audio_projector.pt"}
TABLE_FILES = {"audio_embeddings": "audio/audio_embeddings.pt", "audio_heads": "audio/audio_output_layers.pt"}
"""Language tensors that the released model keeps beside its safetensors."""

_VISION_KEYS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "layer_scale_init": "initializer_factor",
    "rope_base": "rope_theta",
    "norm_eps": "layer_norm_eps",
    "adaptor_dim": "adaptor_dim",
    "min_patches": "min_tokens",
    "max_patches": "max_tokens",
}
_VISION_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "intermediate_size": 4224,
    "initializer_factor": 0.1,
    "rope_theta": 10000,
    "layer_norm_eps": 1e-6,
    "adaptor_dim": 7168,
    "min_tokens": 576,
    "max_tokens": 16384,
}
"""What the published class takes where its file is silent."""
_VISION_FORM = {
    "pe_type": "rope2d",
    "hidden_act": "SwiGLU",
    "norm_type": "RMSNorm",
    "qkv_bias": False,
    "qk_normalization": True,
    "spatial_merge_size": 1,
    "use_pre_norm": False,
}
_VISION_OURS = ("merge", "projector_linears", "side_multiple", "max_frames")
"""Ours alone; written beside the published keys, read where they stand."""
_AUDIO_KEYS = {
    "hidden_size": "hidden_size",
    "projection_size": "proj_size",
    "ctc_vocab_size": "vocab_size",
    "num_layers": "nlayer",
    "num_post_layers": "ndnn",
    "num_lookahead_layers": "num_right_layers",
    "left_order": "left_order",
    "right_order": "right_order",
    "dropout": "dropout",
}
_AUDIO_FORM = {"left_stride": 1, "right_stride": 1, "activation": "relu6"}
_FBANK_FORM = {"dither": 0, "frame_length": 25, "frame_shift": 10, "preemphasis": 0.97}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the whole released folder") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object; fetch it again")
    return found


def read_pt(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pt`` file by name, without running anything in it.

    Raises:
        CheckpointError: missing, cut short, holds code, or is no table of tensors.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the whole released folder") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            why = "it asks to run code"
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is no file of tensors: {why}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} is no table of names and tensors; only such files are read")
    return {str(name): tensor for name, tensor in found.items()}


def write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a ``.pt`` file of plain tensors, each with storage of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, path)


def published_audio_name(name: str) -> str:
    """Published name of a tensor of ours inside ``audio_encoder.pt`` (the prefix ``encoder.`` is off)."""
    parts = name.split(".")
    if parts[0] == "layers":
        inner = {"norm1": "memory_ln", "norm2": "ffn.0", "linear1": "ffn.1", "linear2": "ffn.3"}
        return ".".join(["fsmn_layers", parts[1], inner.get(parts[2], parts[2]), *parts[3:]])
    if parts[0] == "pre_ffn":
        return ".".join(["ffn", {"linear1": "0", "linear2": "2"}[parts[1]], *parts[2:]])
    if parts[0] == "post_ffn":
        return ".".join(["dnn", str(2 * int(parts[1])), *parts[2:]])
    return ".".join(["output", *parts[1:]]) if parts[0] == "ctc_head" else name


def published_place(name: str, files: Mapping[str, str]) -> tuple[str, str] | None:
    """File and published name of an encoder's tensor of ours; None for the normalisation, which has its own file."""
    for prefix, file in files.items():
        if name.startswith(prefix):
            inner = name.removeprefix(prefix)
            if inner.startswith("cmvn_"):
                return None
            return file, published_audio_name(inner) if file == AUDIO_FILES["encoder."] else inner
    raise CheckpointError(f"tensor {name} belongs to none of {', '.join(files.values())}; is it another network's?")


def read_vision_config(path: Path, output_size: int) -> VisionConfig:
    """Settings of ``vision/config.json``; keys that say nothing about the network are passed over.

    Raises:
        CheckpointError: not readable, or a form this encoder does not have; names key, value and what is read.
    """
    raw = read_json(path)
    raw = raw["vision_config"] if isinstance(raw.get("vision_config"), dict) else raw
    _check_form(path, raw, _VISION_FORM)
    values = {ours: raw.get(key, _VISION_DEFAULTS[key]) for ours, key in _VISION_KEYS.items()}
    if "resize_factor" in raw:
        values["side_multiple"] = int(raw["resize_factor"]) * int(values["patch_size"])
    values |= {key: raw[key] for key in _VISION_OURS if key in raw}
    return _checked(VisionConfig, path, {**values, "output_size": output_size})


def write_vision_config(config: VisionConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """``vision/config.json``: the published keys over what stood there ``before``."""
    values = config.model_dump(mode="json")
    written = {key: values[ours] for ours, key in _VISION_KEYS.items()}
    if config.side_multiple % config.patch_size == 0:
        written["resize_factor"] = config.side_multiple // config.patch_size
    plain = VisionConfig()
    ours = {key: values[key] for key in _VISION_OURS if getattr(config, key) != getattr(plain, key)}
    return {**before, **_VISION_FORM, **written, **ours}


def read_audio_config(folder: Path, output_size: int) -> AudioConfig:
    """Settings of ``audio/config.json`` and ``audio/preprocessor_config.json``.

    Raises:
        CheckpointError: not readable, a form this encoder does not have, or sizes that contradict each other.
    """
    path, front_path = folder / "config.json", folder / "preprocessor_config.json"
    raw, front = read_json(path), read_json(front_path)
    _check_form(path, raw, _AUDIO_FORM)
    plain = AudioConfig()
    values: dict[str, Any] = {ours: raw.get(key, getattr(plain, ours)) for ours, key in _AUDIO_KEYS.items()}
    fbank, splice = front.get("fbank", {}), front.get("splice", {})
    _check_form(front_path, fbank, _FBANK_FORM)
    _check_form(front_path, front.get("delta", {}), {"delta_order": 0})
    rate = fbank.get("freq", plain.sample_rate_hz)
    high = fbank.get("high_freq", plain.mel_high_hz)
    values |= {
        "sample_rate_hz": rate,
        "num_mels": fbank.get("num_mel_bins", plain.num_mels),
        "mel_low_hz": fbank.get("low_freq", plain.mel_low_hz),
        "mel_high_hz": high + rate / 2 if high <= 0 else high,
        "splice_left": splice.get("left", plain.splice_left),
        "splice_right": splice.get("right", plain.splice_right),
        "stride": splice.get("stride", plain.stride),
        "output_size": output_size,
    }
    config = _checked(AudioConfig, path, values)
    width = config.splice_frames * config.num_mels
    if raw.get("input_size", width) != width:
        raise CheckpointError(
            f"{path}: input_size is {raw['input_size']}, yet {front_path.name} splices {config.splice_frames} frames "
            f"of {config.num_mels} bins = {width}; the two files are from different models"
        )
    return config


def write_audio_config(config: AudioConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """``audio/config.json`` over what stood there ``before``."""
    values = config.model_dump(mode="json")
    written = {key: values[ours] for ours, key in _AUDIO_KEYS.items()}
    return {**before, **_AUDIO_FORM, "input_size": config.splice_frames * config.num_mels, **written}


def write_front_config(config: AudioConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """``audio/preprocessor_config.json`` over what stood there ``before``."""
    fbank = {
        **_FBANK_FORM,
        "freq": config.sample_rate_hz,
        "low_freq": config.mel_low_hz,
        "high_freq": config.mel_high_hz,
        "num_mel_bins": config.num_mels,
    }
    splice = {"left": config.splice_left, "right": config.splice_right, "stride": config.stride}
    return {
        **before,
        "fbank": {**before.get("fbank", {}), **fbank},
        "delta": before.get("delta", {"delta_order": 0, "window_size": 2}),
        "cmvn": before.get("cmvn", {"global_cmvn": "audio/global_cmvn"}),
        "splice": {"random_start": False, "seed": 0, **before.get("splice", {}), **splice},
    }


def _check_form(path: Path, raw: Mapping[str, Any], form: Mapping[str, Any]) -> None:
    for key, value in form.items():
        if raw.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}; networks with {value!r} are read, this is another")


def _checked(kind: Any, path: Path, values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
