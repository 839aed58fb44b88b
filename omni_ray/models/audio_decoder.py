"""Decoder side of the codec: codes to waveform, with exactly three frames of look-ahead at 24 kHz.

Legend: B clips, N codec frames (60 ms), D input width (semantic embedding + latents), C channels of a stage, T samples
of a stage, S output samples.
Source: LongCat-Audio-Codec report, streaming decoder; networks.md section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.model import CodecConfig
from omni_ray.models.codec_blocks import (
    DILATIONS,
    KERNEL,
    ResidualUnit,
    Snake,
    normed_conv,
    normed_transposed_conv,
)
from omni_ray.types.errors import ConfigError

LOOKAHEAD_FRAMES = 3
"""Right half of the symmetric 7-frame convolution: 3 x 60 ms = 180 ms."""
LSTM_LAYERS = 2


class GatedLSTM(nn.Module):
    """GLSTM: two unidirectional LSTM layers, each followed by a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstms = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(LSTM_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(LSTM_LAYERS))

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] in and out."""
        for lstm, norm in zip(self.lstms, self.norms, strict=True):
            x_BND = norm(lstm(x_BND)[0])
        return x_BND


class UpsampleStage(nn.Module):
    """Snake -> transposed convolution (C -> C/2, rate times longer) -> three residual units."""

    def __init__(self, channels: int, rate: int, *, causal: bool) -> None:
        super().__init__()
        half = channels // 2
        self.rate = rate
        self.snake = Snake(channels)
        if causal:
            # Kernel = stride: every output sample hangs on one input sample, so nothing waits for the next frame.
            self.up = normed_transposed_conv(channels, half, rate, stride=rate)
        else:
            self.up = normed_transposed_conv(
                channels, half, 2 * rate, stride=rate, padding=math.ceil(rate / 2), output_padding=rate % 2
            )
        self.units = nn.ModuleList(ResidualUnit(half, dilation, causal=causal) for dilation in DILATIONS)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, C, T] -> [B, C/2, rate T]."""
        x_BCT = self.up(self.snake(x_BCT))
        for unit in self.units:
            x_BCT = unit(x_BCT)
        return x_BCT


class AudioDecoder(nn.Module):
    """Semantic ids and acoustic latents to a waveform; whole clips, for training and accelerators.

    24 kHz (causal after the look-ahead) is what streams; 16 kHz (symmetric) belongs to the first training stage.
    """

    def __init__(self, config: CodecConfig, output_rate_hz: int = 24000) -> None:
        super().__init__()
        if output_rate_hz not in (16000, 24000):
            raise ConfigError(f"codec output rate is {output_rate_hz} Hz; choose 16000 or 24000")
        self.causal = output_rate_hz == 24000
        rates = config.decoder_rates_24k if self.causal else config.decoder_rates_16k
        channels, width = config.decoder_dim, config.semantic_dim + config.latent_dim
        if channels % 2 ** len(rates):
            raise ConfigError(
                f"codec.decoder_dim is {channels}; it halves {len(rates)} times, so divide by 2 each time"
            )
        self.semantic = nn.Embedding(config.semantic_codes, config.semantic_dim)
        self.glstm = GatedLSTM(width)
        self.conv_in = normed_conv(width, channels, KERNEL, padding=KERNEL // 2)
        self.stages = nn.ModuleList(
            UpsampleStage(channels >> number, rate, causal=self.causal) for number, rate in enumerate(rates)
        )
        last = channels >> len(rates)
        self.snake_out = Snake(last)
        self.conv_out = normed_conv(last, 1, KERNEL)

    def forward(self, semantic_BN: Tensor, latents_BZN: Tensor) -> Tensor:
        """Ids [B, N] and latents [B, Z, N] -> waveform [B, 1, S] in (-1, 1)."""
        x_BND = torch.cat([self.semantic(semantic_BN), latents_BZN.transpose(1, 2)], dim=-1)
        x_BCT = self.conv_in(self.glstm(x_BND).transpose(1, 2))
        for stage in self.stages:
            x_BCT = stage(x_BCT)
        sides = (KERNEL - 1, 0) if self.causal else (KERNEL // 2, KERNEL // 2)
        return torch.tanh(self.conv_out(F.pad(self.snake_out(x_BCT), sides)))
