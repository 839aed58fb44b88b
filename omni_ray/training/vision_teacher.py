"""A small convolutional teacher for the vision encoder's feature distillation (networks.md section 1, pretraining).

The report distils from a frozen pretrained vision model. The tiny world has none of its own, so a convolutional
classifier is trained first, on the same pictures: convolutions find strokes with far fewer examples than attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# B pictures, S side in pixels, F teacher features

SIDE = 56


class ConvTeacher(nn.Module):
    """Four strided convolutions and a linear classifier; its features are the flattened last map, after a linear."""

    feature_size = 96

    def __init__(self, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layers: list[nn.Module] = []
            for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 64)):
                layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.GELU()]
            self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, self.feature_size))
            self.head = nn.Linear(self.feature_size, classes)

    def features(self, pixels_B3SS: Tensor) -> Tensor:
        """[B, F] of pictures in 0..255, 56 pixels a side."""
        out: Tensor = self.body(pixels_B3SS / 127.5 - 1.0)
        return out

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Class logits [B, classes]."""
        out: Tensor = self.head(F.gelu(self.features(pixels_B3SS)))
        return out


def train_teacher(
    teacher: ConvTeacher, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, *, lr: float = 3e-3
) -> ConvTeacher:
    """Fit the classifier, one-cycle AdamW, and freeze it.

    Args:
        draw: Gives the next batch: pictures [B, 3, S, S] in 0..255 and class ids [B].
    """
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=lr, weight_decay=0.05)
    teacher.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.1 * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1.0 - step / steps)
        pixels, classes = draw()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(teacher(pixels), classes).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)
