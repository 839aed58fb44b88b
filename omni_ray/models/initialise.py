"""First weights of the language model: variance-aligned, from a seed alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig


@torch.no_grad()
def initialise_language(model: nn.Module, config: LanguageConfig, seed: int) -> None:
    """Fill every parameter and zero every buffer; parameters on the meta device are left alone.

    Matrices are normal with ``max(initializer_range, 1/sqrt(fan_in))``: the published range of 0.02 is about
    1/sqrt(6144) at full width, and a narrow model with 0.02 would start almost dead.  The up-projections of MLA take
    1/sqrt(hidden): with the low-rank scales their outputs then have unit variance (variance alignment, networks.md 4).
    What writes into the residual stream is divided by sqrt(2 * sub-layers).
    """
    generator = torch.Generator().manual_seed(seed)
    residual = 1.0 / math.sqrt(2.0 * 4 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            continue
        kind = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            _normal(parameter, _std(kind, parameter.shape[-1], config, residual), generator)
    for buffer in model.buffers():
        if buffer.device.type != "meta":
            buffer.zero_()


def _std(kind: str, fan_in: int, config: LanguageConfig, residual: float) -> float:
    if kind == "embed_tokens" or kind.isdigit():
        return max(config.initializer_range, 1.0 / math.sqrt(config.hidden_size))
    if kind in ("q_b_proj", "kv_b_proj"):
        fan_in = config.hidden_size
    std = max(config.initializer_range, 1.0 / math.sqrt(fan_in))
    return std * residual if kind in ("o_proj", "down_proj") else std


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn in fp32 on the CPU, so that dtype and device do not change the draw.
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
