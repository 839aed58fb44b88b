"""Muon against torch's own, and its orthogonalisation."""

from __future__ import annotations

import pytest
import torch

from omni_ray.training.muon import Muon, orthogonalise


def test_equals_torch_muon_within_its_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 32), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.01)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        moved = (q - first).norm()
        assert moved > 0.1
        assert (p - q).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 24, 8), (3, 8, 24)], ids=str)
def test_singular_values_end_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrices, steps=8))
    assert values.min() > 0.5
    assert values.max() < 1.4
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(orthogonalise(matrices).flatten(1), (left @ right).flatten(1)).min() > 0.9
    )


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match=r"not a parameter of shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
