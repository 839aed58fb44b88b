"""Small parts shared by the networks: RMS norm, gated MLP, row padding."""

# T packed tokens, H model dim, F inner dim of a gated MLP

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_TILE = 16
"""Row counts that are multiples of this give the same bits per row in a matrix product."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain; statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TH: Tensor) -> Tensor:
        """Args: x_TH [..., size], any float dtype.  Returns the same shape and dtype."""
        return rms_norm(x_TH, self.weight, self.eps)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, gain: float = 1.0) -> Tensor:
    """``gain * weight * x / sqrt(mean(x^2) + eps)``; the statistics in fp32.

    Source: LongCat-Flash in transformers (``LongcatFlashRMSNorm``); ``gain`` is MLA's low-rank scale.
    """
    x32_TH = x_TH.float()
    scale_T1 = torch.rsqrt(x32_TH.square().mean(dim=-1, keepdim=True) + eps)
    normed_TH = (x32_TH * (scale_T1 * gain if gain != 1.0 else scale_T1)).to(x_TH.dtype)
    return normed_TH * weight_H


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """``silu(gate) * up`` of a joint projection, gate first.  [..., 2F] -> [..., F]."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


class GatedMLP(nn.Module):
    """``W_down(silu(W_gate x) * W_up x)`` with gate and up held as one matrix (split on disk)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out_TH: Tensor = self.down_proj(swiglu(self.gate_up_proj(x_TH)))
        return out_TH


def row_padded(function: Callable[[Tensor], Tensor], x_TH: Tensor, tile: int = ROW_TILE) -> Tensor:
    """Apply a row-wise function with the row count rounded up to a multiple of ``tile``.

    The bits of a matrix product depend on its row count; multiples of 16 agree (runtime notes), so a row's result
    does not feel how many other rows share the call.

    Args:
        function: Maps [T, ...] to [T, ...], each row by itself.
        x_TH: Rows first.
    Returns:
        The first T rows of ``function(x padded with zeros)``.
    """
    rows = x_TH.shape[0]
    missing = -rows % tile
    if missing == 0:
        return function(x_TH)
    padded = torch.cat([x_TH, x_TH.new_zeros((missing, *x_TH.shape[1:]))])
    return function(padded)[:rows]
