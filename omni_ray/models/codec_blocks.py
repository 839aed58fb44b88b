"""Pieces that the codec's encoder and decoder share: Snake, weight-normed convolutions, residual units."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

DILATIONS = (1, 3, 9)
"""Of the three residual units of a stage; together they see 6 * (1 + 3 + 9) samples to one side when causal."""
KERNEL = 7
EPSILON = 1e-9
BRANCH_GAIN = 0.2
"""Start strength of a residual branch."""


class _SnakeFunction(torch.autograd.Function):
    """Snake with its derivative written out: a quarter of the memory passes that recorded operations take.

    y = x + sin^2(a x) / b with b = a + 1e-9, so dy/dx = 1 + (a / b) sin(2 a x) and
    dy/da = (x sin(2 a x) - (y - x)) / b.  At the high rates this is half of a training step on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x_BCT: Tensor, alpha_1C1: Tensor) -> Tensor:
        wave_BCT = (alpha_1C1 * x_BCT).sin_()
        y_BCT = torch.addcmul(x_BCT, wave_BCT.mul_(wave_BCT), 1.0 / (alpha_1C1 + EPSILON))
        ctx.save_for_backward(x_BCT, y_BCT, alpha_1C1)
        return y_BCT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_BCT, y_BCT, alpha_1C1 = ctx.saved_tensors
        grad_BCT = grads[0].contiguous()
        slope_BCT = ((2.0 * alpha_1C1) * x_BCT).sin_().mul_(grad_BCT)
        inverse_1C1 = 1.0 / (alpha_1C1 + EPSILON)
        grad_x_BCT = torch.addcmul(grad_BCT, slope_BCT, alpha_1C1 * inverse_1C1)
        by_channel_C = _dot(slope_BCT, x_BCT) - _dot(grad_BCT, y_BCT) + _dot(grad_BCT, x_BCT)
        return grad_x_BCT, by_channel_C.view(1, -1, 1) * inverse_1C1


def _dot(a_BCT: Tensor, b_BCT: Tensor) -> Tensor:
    """Sum of products over clips and samples; [C]."""
    return torch.einsum("bct,bct->bc", a_BCT, b_BCT).sum(dim=0)


class Snake(nn.Module):
    """Periodic activation ``x + sin^2(alpha x) / (alpha + 1e-9)`` with one alpha a channel.

    Source: LongCat-Audio-Codec report (acoustic encoder after DAC).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        return _SnakeFunction.apply(x_BCT, self.alpha)


def normed_conv(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, gain: float = 1.0
) -> nn.Module:
    """Weight-normed Conv1d, orthogonal start."""
    conv = nn.Conv1d(in_channels, out_channels, kernel, stride=stride, padding=padding)
    return weight_norm(_orthogonal(conv, gain))


def normed_transposed_conv(
    in_channels: int, out_channels: int, kernel: int, *, stride: int, padding: int = 0, output_padding: int = 0
) -> nn.Module:
    """Weight-normed ConvTranspose1d; with kernel = stride each output sample sees one input sample."""
    conv = nn.ConvTranspose1d(
        in_channels, out_channels, kernel, stride=stride, padding=padding, output_padding=output_padding
    )
    return weight_norm(conv)


def _orthogonal(conv: nn.Conv1d, gain: float) -> nn.Conv1d:
    # A meta tensor has no values to orthogonalise; it only counts parameters.
    if conv.weight.device.type != "meta":
        nn.init.orthogonal_(conv.weight, gain)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return conv


class ResidualUnit(nn.Module):
    """``x + conv1(Snake(conv7(Snake(x))))``; causal units see the past only."""

    def __init__(self, channels: int, dilation: int, *, causal: bool) -> None:
        super().__init__()
        self.dilation = dilation
        self.causal = causal
        self.snake_in = Snake(channels)
        self.wide = normed_conv(channels, channels, KERNEL)
        self.wide.dilation = (dilation,)  # type: ignore[assignment]
        self.snake_mid = Snake(channels)
        # Snake only ever adds, so units that start at full strength make the signal grow from unit to unit.
        self.point = normed_conv(channels, channels, 1, gain=BRANCH_GAIN)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, C, T] in, [B, C, T] out."""
        reach = (KERNEL - 1) * self.dilation
        sides = (reach, 0) if self.causal else (reach // 2, reach // 2)
        inner_BCT = self.wide(F.pad(self.snake_in(x_BCT), sides))
        return x_BCT + self.point(self.snake_mid(inner_BCT))


def folded_weight(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (norm folded in) and bias of a convolution, detached, fp32, for inference."""
    weight, bias = conv.weight, conv.bias
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        raise TypeError(f"{type(conv).__name__} is no convolution with weight and bias")
    return weight.detach().float(), bias.detach().float()
