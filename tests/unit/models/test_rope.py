"""Rotary turns against complex numbers; fast path against slow path."""

from __future__ import annotations

import pytest
import torch

from omni_ray.models.rope import Turn, rope_tables


def turn(rows: int, dim: int, base: float = 100.0) -> Turn:
    return Turn(*rope_tables(torch.arange(rows), dim, base))


def turned(x_RD: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rows 0, 1, ... of one sequence of one head."""
    return turn(*x_RD.shape).turned(x_RD[None, :, None], back)[0, :, 0]


def test_pair_i_turns_by_position_times_its_frequency() -> None:
    cos_TP, sin_TP = rope_tables(torch.tensor([0, 1, 7]), 6, 100.0)
    angle = torch.tensor([0.0, 1.0, 7.0])[:, None] * torch.tensor([1.0, 100.0 ** (-1 / 3), 100.0 ** (-2 / 3)])
    torch.testing.assert_close(cos_TP, angle.cos())
    torch.testing.assert_close(sin_TP, angle.sin())


@pytest.mark.parametrize("offset", [0, 1, 2], ids="offset {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_turn_equals_complex_product(offset: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    held = torch.randn(5, 6 + offset + offset % 2).to(dtype)
    x = held[:, offset : offset + 6]
    pairs = torch.view_as_complex(x.float().reshape(5, 3, 2).clone())
    cos, sin = rope_tables(torch.arange(5), 6, 100.0)
    want = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(1)
    close = {"rtol": 1e-2, "atol": 2e-2 if dtype != torch.float32 else 1e-6}
    torch.testing.assert_close(turned(x).float(), want, **close)
    turn(5, 6).turn_into(x[None, :, None], x[None, :, None])
    torch.testing.assert_close(held[:, offset : offset + 6].float(), want, **close)


def test_back_undoes_the_turn() -> None:
    x = torch.randn(4, 8)
    there = turned(x)
    assert not torch.allclose(there[1:], x[1:], atol=1e-2)
    torch.testing.assert_close(turned(there, back=True), x)


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 8).repeat(40, 1), torch.randn(1, 8).repeat(40, 1)
    scores = turned(q) @ turned(k).T
    torch.testing.assert_close(scores[5, 2], scores[37, 34], rtol=1e-4, atol=1e-4)
