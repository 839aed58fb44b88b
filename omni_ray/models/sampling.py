"""Choosing ids from logits: masks, repetition penalty, greedy or by temperature, each row by itself."""

# B rows, V ids, W frames looked back upon

from __future__ import annotations

import torch
from torch import Tensor

REPETITION_PENALTY = 1.1
REPETITION_FRAMES = 30
"""Codec ids of the last 30 frames are made less likely by 1.1 (networks.md section 3.1)."""


def allowed_mask(size: int, allowed: range | list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    """[V] fp32: 0 where an id may be chosen, minus infinity elsewhere; added to logits."""
    mask = torch.full((size,), float("-inf"), device=device)
    mask[torch.as_tensor(list(allowed), dtype=torch.int64, device=device)] = 0.0
    return mask


def penalise_repeats(logits_BV: Tensor, recent_BW: Tensor, penalty: float = REPETITION_PENALTY) -> Tensor:
    """Divide positive and multiply negative logits of recently used ids by ``penalty``.

    Args:
        logits_BV: [B, V].  recent_BW: [B, W] ids, -1 where there is none.
    Returns:
        A new [B, V].
    Source: repetition penalty of CTRL (Keskar et al. 2019), as the published demo uses it for codec ids.
    """
    seen_BV = torch.zeros(logits_BV.shape[0], logits_BV.shape[1] + 1, dtype=torch.bool, device=logits_BV.device)
    # Absent ids go to an extra column that is cut off.
    place_BW = torch.where(recent_BW < 0, logits_BV.shape[1], recent_BW)
    seen_BV.scatter_(1, place_BW, True)
    lowered = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV[:, :-1], lowered, logits_BV)


def choose(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    """One id per row.

    Args:
        logits_BV: [B, V]; masked ids are minus infinity.
        temperature_B: 0 takes the largest logit (the first of equals), else a draw from softmax(logits / temperature).
        uniform_B: [B] numbers in [0, 1), used where the temperature is above 0.
    Returns:
        [B] int64.
    """
    best_B = logits_BV.argmax(dim=-1)
    drawn = temperature_B > 0
    if not bool(drawn.any()):
        return best_B
    scale_B1 = torch.where(drawn, temperature_B, torch.ones_like(temperature_B)).unsqueeze(1)
    total_BV = (logits_BV.double() / scale_B1).softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the last sum, so that rounding cannot leave the largest uniform beyond the end.
    target_B1 = uniform_B.double().unsqueeze(1) * total_BV[:, -1:]
    picked_B = torch.searchsorted(total_BV, target_B1, right=True).squeeze(1).clamp_max(logits_BV.shape[1] - 1)
    return torch.where(drawn, picked_B, best_B)
