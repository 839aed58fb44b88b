"""Fused linears against plain ones: values, gradients, bits for any row count, and weights that have changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.fused_linear import linear_add, linear_relu6

SIZES = [(96, 384), (1200, 256), (24, 8), (512, 40)]


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_values_and_gradients_are_those_of_the_plain_operations(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    x = (4 * torch.randn(33, inputs)).requires_grad_()
    other = torch.randn(33, outputs, requires_grad=True)
    upstream = torch.randn(33, outputs)
    for ours, theirs in (
        (linear_relu6(linear, x), F.relu6(linear(x))),
        (linear_add(linear, x, other), linear(x) + other),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        wanted = [x, *linear.parameters(), *([other] if ours.grad_fn.name().startswith("_LinearAdd") else [])]
        found = torch.autograd.grad(ours, wanted, upstream)
        expected = torch.autograd.grad(theirs, wanted, upstream)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@torch.no_grad()
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it_and_with_a_graph(inputs: int, outputs: int) -> None:
    linear = nn.Linear(inputs, outputs)
    x, other = torch.randn(320, inputs), torch.randn(320, outputs)
    whole, summed = linear_relu6(linear, x), linear_add(linear, x, other)
    for start, count in ((0, 16), (5, 32), (16, 48), (3, 160), (64, 256)):
        rows = slice(start, start + count)
        assert torch.equal(linear_relu6(linear, x[rows]), whole[rows])
        assert torch.equal(linear_add(linear, x[rows], other[rows]), summed[rows])
    with torch.enable_grad():
        assert torch.equal(linear_relu6(linear, x), whole)
        assert torch.equal(linear_add(linear, x, other), summed)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_changed_weight_is_seen(fused: bool) -> None:
    linear, x = nn.Linear(32, 48), torch.randn(16, 32)

    def fresh() -> Tensor:
        copy = nn.Linear(32, 48)
        copy.load_state_dict(linear.state_dict())
        return linear_relu6(copy, x)

    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=fused)
    with torch.no_grad():
        before = linear_relu6(linear, x)
    linear_relu6(linear, x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = linear_relu6(linear, x)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh())
        linear.load_state_dict(nn.Linear(32, 48).state_dict())
        assert torch.equal(linear_relu6(linear, x), fresh())
