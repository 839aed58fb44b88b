"""BEST-RQ: predict random-projection codes of masked stretches of log-mel frames.

Legend: B clips, F fbank frames (10 ms), C mel bins, N codec frames (60 ms), J projected width, K codes.
Source: Chiu et al. 2022; networks.md section 3 (80 x 6 -> 16, masks of 0.4 s).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.speech_training import BestRqConfig

STACK = 6
"""fbank frames of one codec frame."""
FRAME_S = 0.06
NOISE = 0.1
"""Deviation of what stands in a masked stretch, over normalised features."""


class RandomTargets(nn.Module):
    """A frozen random projection and codebook: the codes that have to be guessed. Never trained."""

    project_SJ: Tensor
    codes_KJ: Tensor

    def __init__(self, mels: int, config: BestRqConfig, *, seed: int) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        project = torch.empty(STACK * mels, config.width)
        nn.init.xavier_uniform_(project, generator=chance)
        self.register_buffer("project_SJ", project)
        codes = torch.randn(config.codes, config.width, generator=chance)
        self.register_buffer("codes_KJ", F.normalize(codes, dim=1))

    @torch.no_grad()
    def forward(self, normal_BFC: Tensor) -> Tensor:
        """Codes [B, N] of normalised fbank frames (a last frame that lacks rows is filled up with zeros)."""
        rows_BFC = F.pad(normal_BFC, (0, 0, 0, -normal_BFC.shape[1] % STACK))
        stacked_BNS = rows_BFC.reshape(rows_BFC.shape[0], -1, STACK * rows_BFC.shape[2])
        near_BNK = F.normalize(stacked_BNS @ self.project_SJ, dim=-1) @ self.codes_KJ.t()
        return near_BNK.argmax(dim=-1)


def mask_frames(keep_BN: Tensor, config: BestRqConfig, chance: torch.Generator) -> Tensor:
    """Which codec frames are hidden, [B, N] bool: every real frame begins a stretch with the configured chance.

    Args:
        keep_BN: Real frames of clips padded to one length.
    """
    starts_BN = (torch.rand(keep_BN.shape, generator=chance) < config.mask_share) & keep_BN
    length = max(1, round(config.mask_s / FRAME_S))
    hidden_BN = torch.zeros_like(starts_BN)
    for shift in range(length):
        hidden_BN |= F.pad(starts_BN, (shift, 0))[:, : starts_BN.shape[1]]
    return hidden_BN & keep_BN


def hide(fbank_BFC: Tensor, hidden_BN: Tensor, mean_C: Tensor, scale_C: Tensor, chance: torch.Generator) -> Tensor:
    """Features with noise of deviation 0.1 (after normalisation) wherever a frame is hidden; [B, F, C]."""
    noise_BFC = NOISE * torch.randn(fbank_BFC.shape, generator=chance) / scale_C + mean_C
    hidden_BF = hidden_BN.repeat_interleave(STACK, dim=1)[:, : fbank_BFC.shape[1]]
    return torch.where(hidden_BF.unsqueeze(-1), noise_BFC, fbank_BFC)


def masked_loss(logits_BNK: Tensor, codes_BN: Tensor, hidden_BN: Tensor, hidden_in_all: int) -> Tensor:
    """Cross-entropy summed over this part's hidden frames, over the hidden frames of the whole batch."""
    losses = F.cross_entropy(logits_BNK[hidden_BN], codes_BN[hidden_BN], reduction="sum")
    return losses / max(1, hidden_in_all)
