"""Parameters of every network from its settings alone, on the meta device (networks.md, size tables)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from omni_ray.config.model import LanguageConfig, OmniConfig
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.llm import LanguageModel
from omni_ray.models.vision_encoder import VisionEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageCount:
    """Parameters of the language backbone."""

    total: int
    """Without audio tables and prediction heads; zero-computation experts have none."""
    activated_least: int
    """Used by a token that chose zero experts only; one of the two vocabulary matrices is counted."""
    activated_mean: int
    """With target_ffn_experts FFN experts."""
    activated_most: int
    """With moe_topk FFN experts."""
    audio_tables: int
    """Codec embeddings and heads."""
    prediction_heads: int
    """Multi-token prediction."""


def count_language(config: LanguageConfig) -> LanguageCount:
    """Count one backbone without taking memory for it.

    Source: networks.md section 4: active(k) = L (f + k e) + H + V H.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tables = sum(size for name, size in sizes.items() if name.startswith("audio_"))
    heads = sum(size for name, size in sizes.items() if "mtp" in name.split("."))
    experts = sum(size for name, size in sizes.items() if ".experts." in name and "mtp" not in name.split("."))
    total = sum(sizes.values()) - tables - heads
    vocabulary = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size

    def activated(chosen: float) -> int:
        return round(total - experts * (1 - chosen / config.n_routed_experts)) - vocabulary

    return LanguageCount(
        total=total,
        activated_least=activated(0),
        activated_mean=activated(config.target_ffn_experts),
        activated_most=activated(min(config.moe_topk, config.n_routed_experts)),
        audio_tables=tables,
        prediction_heads=heads,
    )


def count_parameters(config: OmniConfig) -> dict[str, int]:
    """Parameters by part, in the order of the size tables."""
    language = count_language(config.language)
    with torch.device("meta"):
        vision, audio, codec = VisionEncoder(config.vision), AudioEncoder(config.audio), Codec(config.codec)
    counts = {
        "language": language.total,
        "language activated, least": language.activated_least,
        "language activated, mean": language.activated_mean,
        "language activated, most": language.activated_most,
        "language audio tables": language.audio_tables,
        "language prediction heads": language.prediction_heads,
        "vision encoder": _numel(vision.vit),
        "vision projector": _numel(vision.projector),
        "audio encoder": _numel(audio.encoder),
        "audio projector": _numel(audio.projector),
    }
    return counts | {f"codec {name}": _numel(part) for name, part in codec.named_children() if _numel(part)}


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
