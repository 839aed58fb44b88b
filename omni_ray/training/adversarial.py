"""Losses between a generator of sound and its discriminators: least squares or hinge, and feature matching.

Source: LSGAN (Mao et al. 2017); hinge (Lim and Ye 2017); feature matching as in HiFi-GAN and DAC.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.speech_training import AdversarialLoss
from omni_ray.models.discriminators import Judged


def discriminator_loss(real: Sequence[Judged], made: Sequence[Judged], kind: AdversarialLoss) -> Tensor:
    """Mean over members: real sound should score 1 (least squares) or above 1 (hinge), made sound 0 or below -1.

    Args:
        made: Judgements of generated sound that carries no gradient to the generator.
    """
    total = real[0][0].new_zeros(())
    for (right, _), (wrong, _) in zip(real, made, strict=True):
        if kind == "lsgan":
            total = total + (1.0 - right).square().mean() + wrong.square().mean()
        else:
            total = total + F.relu(1.0 - right).mean() + F.relu(1.0 + wrong).mean()
    return total / len(real)


def generator_loss(made: Sequence[Judged], kind: AdversarialLoss) -> Tensor:
    """Mean over members: made sound should be taken for real."""
    total = made[0][0].new_zeros(())
    for score, _ in made:
        total = total + ((1.0 - score).square().mean() if kind == "lsgan" else -score.mean())
    return total / len(made)


def feature_loss(real: Sequence[Judged], made: Sequence[Judged]) -> Tensor:
    """Mean over members and layers of the L1 between features, each over the real ones' mean size."""
    total, layers = real[0][0].new_zeros(()), 0
    for (_, right), (_, wrong) in zip(real, made, strict=True):
        for a, b in zip(right, wrong, strict=True):
            a = a.detach()
            # Relative to the real features: otherwise a discriminator that grows its features turns the weight up.
            total = total + (b - a).abs().mean() / a.abs().mean().clamp_min(1e-6)
            layers += 1
    return total / layers
