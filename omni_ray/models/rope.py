"""Rotary position embedding over interleaved pairs."""

# T packed tokens, R rotary dim (even), P = R/2 pairs

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, fp32 whatever the model's dtype.

    Args:
        positions_T: [T] integer positions inside each sequence.
        dim: Rotary dim R, even.
        base: theta; the curriculum raises it per stage.
    Returns:
        cos, sin: [T, R/2].
    Source: models.md section 4: pair i of (2i, 2i+1) turns by position * base^(-2i/R).
    """
    exponent_P = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_T.device) / dim
    angle_TP = positions_T.float().unsqueeze(-1) * (1.0 / (base**exponent_P))
    return angle_TP.cos(), angle_TP.sin()


def rotate_pairs(x_TnR: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of the last dim by their angles.

    Args:
        x_TnR: [T, heads, R], any float dtype; turned in fp32.
        cos_TP: From :func:`rope_tables`.  sin_TP: the same.
    Returns:
        Same shape and dtype as ``x_TnR``.
    """
    cos_T1P, sin_T1P = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    even_TnP, odd_TnP = x_TnR[..., 0::2].float(), x_TnR[..., 1::2].float()
    turned = torch.stack((even_TnP * cos_T1P - odd_TnP * sin_T1P, odd_TnP * cos_T1P + even_TnP * sin_T1P), dim=-1)
    return turned.flatten(-2).to(x_TnR.dtype)
