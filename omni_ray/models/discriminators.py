"""Discriminators of the codec's adversarial stage: multi-period and multi-band STFT.

Legend: B clips, S samples, C channels, P period, T frames or folded samples, F frequency lines.
Source: HiFi-GAN (multi-period), DAC (multi-band STFT); networks.md section 3, losses of the codec.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from omni_ray.config.speech_training import DiscriminatorConfig

SLOPE = 0.1
"""Of the leaky rectifier."""
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Edges of the bands as shares of the lines; each has convolutions of its own."""
Judged = tuple[Tensor, list[Tensor]]
"""A discriminator's scores, and the features of its layers, for the matching loss."""


def _conv2d(inside: int, outside: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    return weight_norm(nn.Conv2d(inside, outside, kernel, stride=stride, padding=padding))


class PeriodDiscriminator(nn.Module):
    """Looks at every P-th sample: the wave folded to [T / P, P], convolved along time alone."""

    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *channels]
        last = len(channels) - 1
        self.convs = nn.ModuleList(
            _conv2d(sizes[i], sizes[i + 1], (5, 1), (1, 1) if i == last else (3, 1)) for i in range(len(channels))
        )
        self.score = _conv2d(channels[-1], 1, (3, 1))

    def forward(self, wave_BS: Tensor) -> Judged:
        """Scores of any shape, one a clip's stretch, and every layer's features."""
        missing = -wave_BS.shape[1] % self.period
        # At least one period is mirrored, as in the source, so that the last sample has a neighbour.
        x = F.pad(wave_BS.unsqueeze(1), (0, missing or self.period), mode="reflect")
        x = x.view(x.shape[0], 1, -1, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return self.score(x), features


class BandDiscriminator(nn.Module):
    """Looks at the complex STFT of one window length, each band of frequencies through its own convolutions."""

    window_W: Tensor

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.window, self.hop = window, window // 4
        self.register_buffer("window_W", torch.hann_window(window), persistent=False)
        lines = window // 2 + 1
        self.edges = [(math.floor(low * lines), math.floor(high * lines)) for low, high in pairwise(BANDS)]
        self.bands = nn.ModuleList(self._stack(channels) for _ in self.edges)
        self.score = _conv2d(channels, 1, (3, 3))

    @staticmethod
    def _stack(channels: int) -> nn.ModuleList:
        wide = [_conv2d(channels, channels, (3, 9), (1, 2)) for _ in range(3)]
        return nn.ModuleList([_conv2d(2, channels, (3, 9)), *wide, _conv2d(channels, channels, (3, 3))])

    def forward(self, wave_BS: Tensor) -> Judged:
        """As :class:`PeriodDiscriminator`."""
        spectrum_BFT = torch.stft(
            wave_BS, self.window, self.hop, window=self.window_W, center=True, return_complex=True
        )
        x_B2TF = torch.view_as_real(spectrum_BFT).permute(0, 3, 2, 1)
        features, ends = [], []
        stacks: Iterable[Any] = self.bands
        for (low, high), stack in zip(self.edges, stacks, strict=True):
            x = x_B2TF[..., low:high]
            for conv in stack:
                x = F.leaky_relu(conv(x), SLOPE)
                features.append(x)
            ends.append(x)
        return self.score(torch.cat(ends, dim=-1)), features


class Discriminators(nn.Module):
    """All of them; every wave is brought to one loudness first, so that loudness itself is no evidence."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            [
                *(PeriodDiscriminator(period, config.period_channels) for period in config.periods),
                *(BandDiscriminator(window, config.band_channels) for window in config.windows),
            ]
        )

    def forward(self, wave_BS: Tensor) -> list[Judged]:
        """[B, S] to one judgement a member."""
        centred_BS = wave_BS - wave_BS.mean(dim=1, keepdim=True)
        wave_BS = 0.8 * centred_BS / (centred_BS.abs().amax(dim=1, keepdim=True) + 1e-9)
        return [member(wave_BS) for member in self.members]
