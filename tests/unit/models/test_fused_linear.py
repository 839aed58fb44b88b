"""Fused linears against plain ones: values, gradients, bits for any row count, and weights that have changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.fused_linear import linear, linear_add, linear_relu6

SIZES = [(96, 384), (1200, 256), (24, 8), (512, 40)]


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_values_and_gradients_are_those_of_the_plain_operations(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = (4 * torch.randn(33, inputs)).requires_grad_()
    other = torch.randn(33, outputs, requires_grad=True)
    upstream = torch.randn(33, outputs)
    for ours, theirs, takes_other in (
        (linear_relu6(layer, x), F.relu6(layer(x)), False),
        (linear(layer, x), layer(x), False),
        (linear_add(layer, x, other), layer(x) + other, True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        wanted = [x, *layer.parameters(), *([other] if takes_other else [])]
        found = torch.autograd.grad(ours, wanted, upstream)
        expected = torch.autograd.grad(theirs, wanted, upstream)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@torch.no_grad()
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it_and_with_a_graph(inputs: int, outputs: int) -> None:
    layer = nn.Linear(inputs, outputs)
    x, other = torch.randn(320, inputs), torch.randn(320, outputs)

    def every(rows: slice) -> list[Tensor]:
        part, beside = x[rows], other[rows]
        return [
            linear(layer, part),
            linear_relu6(layer, part),
            linear_add(layer, part, beside),
        ]

    whole = every(slice(None))
    for start, count in ((0, 16), (5, 32), (16, 48), (3, 160), (64, 256)):
        rows = slice(start, start + count)
        assert all(torch.equal(some, all_rows[rows]) for some, all_rows in zip(every(rows), whole, strict=True))
    with torch.enable_grad():
        assert all(torch.equal(one, other) for one, other in zip(every(slice(None)), whole, strict=True))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_changed_weight_is_seen(fused: bool) -> None:
    layer, x = nn.Linear(32, 48), torch.randn(16, 32)

    def fresh() -> Tensor:
        copy = nn.Linear(32, 48)
        copy.load_state_dict(layer.state_dict())
        return linear_relu6(copy, x)

    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    with torch.no_grad():
        before = linear_relu6(layer, x)
    linear_relu6(layer, x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = linear_relu6(layer, x)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh())
        layer.load_state_dict(nn.Linear(32, 48).state_dict())
        assert torch.equal(linear_relu6(layer, x), fresh())
