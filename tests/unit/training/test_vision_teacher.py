"""The convolutional teacher learns, and is frozen afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_ray.training.vision_teacher import ConvTeacher, train_teacher


def test_teacher_learns_to_tell_bars_apart_and_is_frozen() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        classes = torch.randint(2, (16,), generator=generator)
        pixels = torch.rand(16, 3, 56, 56, generator=generator) * 60
        for picture, label in zip(pixels, classes, strict=True):
            start = int(torch.randint(40, (1,), generator=generator))
            bar = picture[:, start : start + 8] if label else picture[:, :, start : start + 8]
            bar += 150
        return pixels, classes

    teacher = train_teacher(ConvTeacher(2), draw, steps=30)
    pixels, classes = draw()
    assert (teacher(pixels).argmax(dim=1) == classes).float().mean() >= 0.9
    assert teacher.features(pixels).shape == (16, teacher.feature_size)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
