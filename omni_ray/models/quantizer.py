"""Adaptive grouped residual vector quantiser (AGRVQ) of the codec.

Legend: B clips, Z latent channels, T frames, L levels, G entries of one sub-codebook, P sub-codebook width.
Source: LongCat-Audio-Codec report, adaptive grouped residual vector quantisation; DAC for the losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.codec_blocks import normed_conv
from omni_ray.types.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What the quantiser makes of latents."""

    values_BZT: Tensor
    """Sum of the levels' outputs; gradients pass straight through to the latents."""
    codes_BTL: Tensor
    """Joint code of each level, ``ia * G + ib``, int64."""
    commit_loss: Tensor
    """Pulls the projections towards their entries (scalar, mean over values and summed over levels)."""
    codebook_loss: Tensor
    """Pulls the entries towards the projections (scalar)."""


class GroupCodebook(nn.Module):
    """One sub-codebook: looked up by cosine, read out un-normalised."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.entries_GP = nn.Parameter(torch.randn(entries, width))

    def nearest(self, x_BPT: Tensor) -> Tensor:
        """Entry of greatest cosine for every column; [B, T] int64."""
        cosine_BTG = F.normalize(x_BPT, dim=1).transpose(1, 2) @ F.normalize(self.entries_GP, dim=1).t()
        return cosine_BTG.argmax(dim=-1)

    def read(self, index_BT: Tensor) -> Tensor:
        """Entries of the given ids; [B, P, T]."""
        return F.embedding(index_BT, self.entries_GP).transpose(1, 2)


class QuantizerLevel(nn.Module):
    """One level: two learned projections ("adaptive groups"), each with its own sub-codebook."""

    def __init__(self, latent_dim: int, group_codes: int, group_dim: int) -> None:
        super().__init__()
        self.group_codes = group_codes
        self.project_in = nn.ModuleList(normed_conv(latent_dim, group_dim, 1) for _ in range(2))
        self.codebooks = nn.ModuleList(GroupCodebook(group_codes, group_dim) for _ in range(2))
        halves = (latent_dim // 2, latent_dim - latent_dim // 2)
        self.project_out = nn.ModuleList(normed_conv(group_dim, half, 1) for half in halves)

    def forward(self, residual_BZT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantise a residual: output [B, Z, T], codes [B, T], commit loss, codebook loss."""
        parts, codes, commit, codebook = [], [], residual_BZT.new_zeros(()), residual_BZT.new_zeros(())
        groups: Iterable[Any] = zip(self.project_in, self.codebooks, self.project_out, strict=True)
        for project, book, out in groups:
            x_BPT = project(residual_BZT)
            index_BT = book.nearest(x_BPT)
            entry_BPT = book.read(index_BT)
            commit = commit + F.mse_loss(x_BPT, entry_BPT.detach())
            codebook = codebook + F.mse_loss(entry_BPT, x_BPT.detach())
            parts.append(out(x_BPT + (entry_BPT - x_BPT).detach()))
            codes.append(index_BT)
        return torch.cat(parts, dim=1), codes[0] * self.group_codes + codes[1], commit, codebook

    def read(self, codes_BT: Tensor) -> Tensor:
        """Output of the level for known codes; [B, Z, T]."""
        split = (codes_BT // self.group_codes, codes_BT % self.group_codes)
        pairs: Iterable[Any] = zip(self.codebooks, self.project_out, split, strict=True)
        return torch.cat([out(book.read(index_BT)) for book, out, index_BT in pairs], dim=1)


class Quantizer(nn.Module):
    """AGRVQ: every level quantises what the levels before it left over."""

    def __init__(self, latent_dim: int, levels: int, group_codes: int, group_dim: int) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ConfigError(f"codec.latent_dim is {latent_dim}; two groups need at least 2 channels")
        self.group_codes = group_codes
        self.levels = nn.ModuleList(QuantizerLevel(latent_dim, group_codes, group_dim) for _ in range(levels))

    def forward(self, latents_BZT: Tensor, levels_B: Tensor | None = None) -> Quantized:
        """Quantise latents.

        Args:
            latents_BZT: Acoustic latents, float.
            levels_B: Levels that each clip may use (quantiser dropout: train more, use less); None for all.
        """
        residual_BZT, total_BZT = latents_BZT, torch.zeros_like(latents_BZT)
        codes, commit, codebook = [], latents_BZT.new_zeros(()), latents_BZT.new_zeros(())
        for number, level in enumerate(self.levels):
            out_BZT, codes_BT, level_commit, level_codebook = level(residual_BZT)
            residual_BZT = residual_BZT - out_BZT
            if levels_B is not None:
                out_BZT = out_BZT * (number < levels_B).to(out_BZT.dtype).view(-1, 1, 1)
            total_BZT = total_BZT + out_BZT
            commit, codebook = commit + level_commit, codebook + level_codebook
            codes.append(codes_BT)
        return Quantized(
            values_BZT=total_BZT, codes_BTL=torch.stack(codes, dim=-1), commit_loss=commit, codebook_loss=codebook
        )

    def read(self, codes_BTL: Tensor) -> Tensor:
        """Latents [B, Z, T] of known codes; fewer levels than trained give a coarser sound.

        Raises:
            RequestError: more levels than the quantiser has, or none.
        """
        count = codes_BTL.shape[-1]
        if not 1 <= count <= len(self.levels):
            raise RequestError(f"{count} acoustic codebooks given; this codec decodes 1 to {len(self.levels)}")
        levels: Iterable[Any] = self.levels
        parts = [level.read(codes_BTL[..., number]) for number, level in enumerate(levels) if number < count]
        return torch.stack(parts).sum(dim=0)
