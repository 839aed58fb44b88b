"""Deep-FSMN layers: a learnt sliding memory in place of self-attention, with exact streaming (networks.md 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omni_ray.config.model import AudioConfig
from omni_ray.models.fused_linear import linear_add, linear_relu6
from omni_ray.models.layers import row_padded
from omni_ray.models.streaming import GappedRows

# R packed rows, B streams, N rows in time, P projection size, G rows with gaps, K memory taps


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """What one FSMN layer keeps of a running stream."""

    history_BNP: Tensor
    """LN1 outputs: ``left_order`` rows before the first pending row, then those of the pending rows."""
    pending_BNP: Tensor
    """Layer inputs whose right context has not come yet; at most ``right_order`` rows."""


def _slide(x_BGP: Tensor, weight_P1K: Tensor) -> Tensor:
    """Depthwise sliding sum, [B, G, P] -> [B, G - K + 1, P], without padding.

    A row's bits do not depend on the number of rows or streams: oneDNN's kernel for rows-first memory makes every value
    by one chain of fused products over the taps (eight times as fast as tap by tap).
    """
    length = x_BGP.shape[1] - weight_P1K.shape[2] + 1
    if length < 1:
        return x_BGP[:, :0]
    if x_BGP.is_cpu and torch.backends.mkldnn.is_available() and x_BGP.dtype in (torch.float32, torch.bfloat16):
        # [B, P, G, 1] in channels-last strides: the rows as they lie.
        image = x_BGP.contiguous().unsqueeze(2).permute(0, 3, 1, 2)
        weight = weight_P1K.unsqueeze(-1)
        out = torch.mkldnn_convolution(image, weight, None, [0, 0], [1, 1], [1, 1], weight.shape[0])
        return out.permute(0, 2, 3, 1).flatten(1, 2)
    taps_KP = weight_P1K[:, 0].t()
    total = x_BGP.narrow(1, 0, length) * taps_KP[0]
    for k in range(1, taps_KP.shape[0]):
        # Not addcmul: it fuses the rounding in full vectors only, so bits would depend on where a row stands.
        total.add_(x_BGP.narrow(1, k, length) * taps_KP[k])
    return total


class _Memory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BGP: Tensor, weight_P1K: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x_BGP, weight_P1K)
        return _slide(x_BGP, weight_P1K)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BNP: Tensor):  # type: ignore[no-untyped-def, override]
        x_BGP, weight_P1K = ctx.saved_tensors
        taps, length = weight_P1K.shape[2], grad_BNP.shape[1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _slide(F.pad(grad_BNP, (0, 0, taps - 1, taps - 1)), weight_P1K.flip(2).contiguous())
        if ctx.needs_input_grad[1]:
            sums = [(grad_BNP * x_BGP.narrow(1, k, length)).sum(dim=(0, 1)) for k in range(taps)]
            grad_weight = torch.stack(sums, dim=1).unsqueeze(1)
        return grad_x, grad_weight


class FsmnLayer(nn.Module):
    """Pre-norm FSMN layer.

    m_t = x_t + Drop(sum over i = -N1..N2 of w_i * LN1(x)_{t+i});  y_t = m_t + W2 relu6(W1 LN2(m_t) + b1) + b2.
    Beyond the ends of an utterance LN1(x) counts as zero.
    Source: LongCat-Flash-Omni report and published demo code (deep-FSMN, memory stride 1).
    """

    def __init__(self, config: AudioConfig, right_order: int) -> None:
        super().__init__()
        size, inner = config.projection_size, config.hidden_size
        self.left_order = config.left_order
        self.right_order = right_order
        self.norm1 = nn.LayerNorm(size)
        # Held as a depthwise convolution for its name and shape [P, 1, K]; see _slide.
        self.memory = nn.Conv1d(size, size, config.left_order + right_order + 1, groups=size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(size)
        self.linear1 = nn.Linear(size, inner)
        self.linear2 = nn.Linear(inner, size)

    def forward(self, x_RP: Tensor, rows: GappedRows) -> Tensor:
        """Whole utterances, packed: [R, P] -> [R, P]; ``rows`` has gaps of at least N1 before and N2 after."""
        remembered_RP = rows.collect(self._remember(rows.spread(self.norm1(x_RP))), self.left_order)
        return self._feed_forward(self.dropout(remembered_RP).add_(x_RP))

    def stream(self, x_BNP: Tensor, state: LayerState, final: bool) -> tuple[Tensor, LayerState]:
        """The next rows of running streams, any number; ``final`` puts zeros where right context will never come."""
        seen_BNP = torch.cat([state.history_BNP, self.norm1(x_BNP)], dim=1)
        inputs_BNP = torch.cat([state.pending_BNP, x_BNP], dim=1)
        if final:
            seen_BNP = F.pad(seen_BNP, (0, 0, 0, self.right_order))
        ready = max(0, seen_BNP.shape[1] - self.left_order - self.right_order)
        state = LayerState(history_BNP=seen_BNP[:, ready:].clone(), pending_BNP=inputs_BNP[:, ready:].clone())
        if not ready:
            return x_BNP[:, :0], state
        mixed_BNP = inputs_BNP[:, :ready] + self.dropout(self._remember(seen_BNP))
        return self._feed_forward(mixed_BNP.flatten(0, 1)).unflatten(0, mixed_BNP.shape[:2]), state

    def initial_state(self, batch_size: int) -> LayerState:
        """Zeros in LN space before the first row."""
        like = self.norm1.weight
        return LayerState(
            history_BNP=like.new_zeros(batch_size, self.left_order, like.shape[0]),
            pending_BNP=like.new_zeros(batch_size, 0, like.shape[0]),
        )

    def _remember(self, normed: Tensor) -> Tensor:
        """[..., G, P] -> [..., G - K + 1, P]; sum over taps, oldest first."""
        flat_BGP = normed if normed.dim() == 3 else normed.unsqueeze(0)
        out_BNP: Tensor = _Memory.apply(flat_BGP, self.memory.weight)
        return out_BNP.view(*normed.shape[:-2], *out_BNP.shape[-2:])

    def _feed_forward(self, m_RP: Tensor) -> Tensor:
        def outer(m_RP: Tensor) -> Tensor:
            return linear_add(self.linear2, linear_relu6(self.linear1, self.norm2(m_RP)), m_RP)

        return row_padded(outer, m_RP)
