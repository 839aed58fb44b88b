"""Encoder side of the codec: a semantic branch (words) and an acoustic branch (how they sound).

Legend: B clips, F fbank frames (10 ms), C mel bins, D semantic width, N codec frames (60 ms), K centres, S samples,
Z latent width.
Source: LongCat-Audio-Codec report, semantic and acoustic encoders; networks.md section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.model import CodecConfig
from omni_ray.models.codec_blocks import DILATIONS, KERNEL, ResidualUnit, Snake, normed_conv
from omni_ray.types.errors import ConfigError

CONV_CHANNELS = 32
TIME_STRIDES = (2, 3)
"""10 ms fbank frames become 60 ms codec frames."""
LEFT_PAD = 2


class SemanticLayer(nn.Module):
    """Pre-LN bidirectional self-attention and GELU feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None) -> Tensor:
        """[B, N, D] in and out; ``keep_BN`` marks real frames of clips padded to one length."""
        batch, frames, width = x_BND.shape
        qkv = self.qkv(self.norm1(x_BND)).view(batch, frames, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if keep_BN is None else keep_BN[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x_BND = x_BND + self.out(mixed.transpose(1, 2).reshape(batch, frames, width))
        return x_BND + self.fc2(F.gelu(self.fc1(self.norm2(x_BND))))


class SemanticEncoder(nn.Module):
    """fbank -> two Conv2d -> transformer -> l2-normalised last layer -> nearest k-means centre."""

    mean_C: Tensor
    scale_C: Tensor
    centres_KD: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, bins = config.semantic_dim, config.num_mels
        if width % config.semantic_heads or width % 2:
            raise ConfigError(
                f"codec.semantic_dim {width} must be even and divide by semantic_heads {config.semantic_heads}"
            )
        self.register_buffer("mean_C", torch.zeros(bins))
        self.register_buffer("scale_C", torch.ones(bins))
        self.convs = nn.ModuleList(
            nn.Conv2d(1 if number == 0 else CONV_CHANNELS, CONV_CHANNELS, 3, stride=(stride, 1))
            for number, stride in enumerate(TIME_STRIDES)
        )
        self.project = nn.Linear(CONV_CHANNELS * (bins - 2 * len(TIME_STRIDES)), width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            SemanticLayer(width, config.semantic_heads, config.semantic_ffn) for _ in range(config.semantic_layers)
        )
        self.register_buffer("centres_KD", torch.zeros(config.semantic_codes, width))

    def forward(self, fbank_BFC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """Last layer before normalisation, [B, N, D], of fbank frames (F = 6 N - 2 for N x 960 samples)."""
        x = ((fbank_BFC - self.mean_C) * self.scale_C).unsqueeze(1)
        for conv in self.convs:
            x = F.relu(conv(F.pad(x, (0, 0, LEFT_PAD, 0))))
        batch, _, frames, _ = x.shape
        x_BND = self.norm(self.project(x.transpose(1, 2).reshape(batch, frames, -1)))
        x_BND = x_BND + sinusoids(frames, x_BND.shape[-1], x_BND)
        for layer in self.layers:
            x_BND = layer(x_BND, keep_BN)
        return x_BND

    def codes(self, fbank_BFC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """Semantic ids [B, N], int64: the nearest centre of each l2-normalised frame."""
        x_BND = F.normalize(self(fbank_BFC, keep_BN), dim=-1)
        # argmin |x - c|^2 = argmin |c|^2 - 2 x.c; exact, and one product instead of a [B, N, K, D] difference.
        distance_BNK = self.centres_KD.square().sum(-1) - 2.0 * (x_BND @ self.centres_KD.t())
        return distance_BNK.argmin(dim=-1)


def sinusoids(frames: int, width: int, like: Tensor) -> Tensor:
    """Sinusoidal positions [N, D] with the dtype and device of ``like``."""
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angle = torch.arange(frames, dtype=torch.float64).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(device=like.device, dtype=like.dtype)


class AcousticEncoder(nn.Module):
    """DAC-like convolutional encoder: 16 kHz waveform to one latent every 60 ms; segment based, not causal."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        channels = config.encoder_base
        layers: list[nn.Module] = [normed_conv(1, channels, KERNEL, padding=KERNEL // 2)]
        for stride in config.encoder_strides:
            layers += [ResidualUnit(channels, dilation, causal=False) for dilation in DILATIONS]
            layers += [
                Snake(channels),
                normed_conv(channels, 2 * channels, 2 * stride, stride=stride, padding=math.ceil(stride / 2)),
            ]
            channels *= 2
        layers += [Snake(channels), normed_conv(channels, config.latent_dim, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, wave_B1S: Tensor) -> Tensor:
        """[B, 1, 960 N] -> latents [B, Z, N]."""
        return self.layers(wave_B1S)
