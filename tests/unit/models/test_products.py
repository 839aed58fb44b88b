"""Compiled matrix products: right in every orientation and size, and an element's bits its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from omni_ray.models import products as chosen
from omni_ray.models.native.library import library
from omni_ray.models.native.products import Products
from omni_ray.models.products import Linear, add_product, batched_product, grouped_product, product


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Products]:
    """The compiled form on every processor, whether or not it would be chosen there."""
    found = library()
    if found is None:
        pytest.skip("no C compiler")
    made = Products(found)
    monkeypatch.setattr(chosen, "products", lambda: made)
    return made


def matrix(rows: int, columns: int, kind: str, seed: int) -> Tensor:
    """Plain, transposed, a slice whose rows lie apart, or of no unit step at all."""
    chance = torch.Generator().manual_seed(seed)
    if kind == "turned":
        return torch.randn(columns, rows, generator=chance).t()
    if kind == "slice":
        return torch.randn(rows, columns + 5, generator=chance)[:, 2 : 2 + columns]
    if kind == "apart":
        return torch.randn(rows, 2 * columns, generator=chance)[:, ::2]
    return torch.randn(rows, columns, generator=chance)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)


KINDS = ("plain", "turned", "slice", "apart")
SIZES = [
    (1, 1, 1),
    (6, 64, 16),
    (5, 63, 17),
    (97, 130, 33),
    (13, 20, 700),
    (100, 2100, 5),
    (3, 70, 0),
    (0, 4, 4),
    (4, 0, 4),
]


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SIZES)
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
def test_equal_the_plain_product(rows: int, outputs: int, inputs: int, kinds: tuple[str, str]) -> None:
    a, b = matrix(rows, inputs, kinds[0], 0), matrix(inputs, outputs, kinds[1], 1)
    close(product(a, b), a.double() @ b.double())
    total = torch.ones(rows, outputs)
    add_product(total, a, b)
    close(total, 1 + a.double() @ b.double())


@pytest.mark.parametrize("add", [False, True])
def test_batches_into_a_part_of_a_tensor(add: bool) -> None:
    a, b = torch.randn(3, 20, 48), torch.randn(3, 70, 48).transpose(1, 2)
    room = torch.ones(3, 50, 70)
    batched_product(a, b, room[:, 10:30], add=add)
    close(room[:, 10:30], a.double() @ b.double() + int(add))
    assert bool((room[:, :10] == 1).all())
    assert bool((room[:, 30:] == 1).all())
    close(batched_product(a, b), a.double() @ b.double())


@pytest.mark.parametrize("turned", [False, True])
def test_groups_of_rows_and_of_inputs(turned: bool) -> None:
    ends = torch.tensor([0, 7, 7, 60, 61], dtype=torch.int32)
    bounds = list(itertools.pairwise([0, *ends.tolist()]))
    x, weight = torch.randn(61, 24), torch.randn(5, 33, 24)
    weights = weight.transpose(1, 2) if turned else weight.transpose(1, 2).contiguous()
    expected = torch.cat([x[s:e].double() @ weights[g].double() for g, (s, e) in enumerate(bounds)])
    close(grouped_product(x, weights, ends), expected)
    other = torch.randn(61, 40)
    inner = torch.stack([x[s:e].double().t() @ other[s:e].double() for s, e in bounds])
    close(grouped_product(x.t(), other, ends), inner)


def test_an_elements_bits_feel_neither_rows_columns_nor_layout() -> None:
    a, b = torch.randn(203, 1100), torch.randn(1100, 300)
    whole = product(a, b)
    for start, end in [(0, 1), (3, 9), (100, 203)]:
        assert torch.equal(product(a[start:end], b), whole[start:end])
        assert torch.equal(product(a, b[:, start:end]), whole[:, start:end])
    assert torch.equal(product(a.t().contiguous().t(), b), whole)
    assert torch.equal(product(a, b.t().contiguous().t()), whole)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_same_bits_on_two_threads(two_threads: None) -> None:
    a, b, ends = torch.randn(400, 90), torch.randn(4, 90, 70), torch.tensor([10, 200, 210, 400], dtype=torch.int32)
    wide, turned = torch.randn(90, 900), torch.randn(900, 90).t()

    def made() -> list[Tensor]:
        total = torch.ones(70, 900)
        add_product(total, a[:70], wide)
        few = [product(a[:70], wide), product(a[:70], turned), total]  # columns are shared out, not rows
        return [*few, product(a, b[0]), grouped_product(a, b, ends), batched_product(a.view(4, 100, 90), b)]

    many = made()
    torch.set_num_threads(1)
    for found, one in zip(many, made(), strict=True):
        assert torch.equal(found, one)


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (0, 24), (24,)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients_equal_torchs(shape: tuple[int, ...], bias: bool) -> None:
    mine, plain = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(mine.state_dict())
    made = []
    for layer in (mine, plain):
        x = torch.linspace(-1, 1, 24).expand(shape).clone().requires_grad_()
        out = layer(x)
        out.sum().backward()  # the gradient has no unit step
        made.append((out, x.grad, *(weight.grad for weight in layer.parameters())))
    for found, expected in zip(*made, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(mine(x), made[0][0]), "the same bits with and without a graph"


def test_shapes_that_do_not_fit_are_refused(compiled: Products) -> None:
    ends = torch.tensor([2, 4], dtype=torch.int32)
    for wrong in (
        lambda: Linear(24, 40)(torch.randn(4, 100)),
        lambda: product(torch.randn(4, 8), torch.randn(7, 4)),
        lambda: add_product(torch.randn(4, 5), torch.randn(4, 8), torch.randn(8, 4)),
        lambda: add_product(torch.randn(4, 4).t(), torch.randn(4, 8), torch.randn(8, 4)),
        lambda: batched_product(torch.randn(2, 4, 8), torch.randn(3, 8, 4)),
        lambda: batched_product(torch.randn(2, 4, 8), torch.randn(2, 8, 4), torch.randn(2, 4, 4).transpose(1, 2)),
        lambda: grouped_product(torch.randn(5, 8), torch.randn(2, 8, 4), ends),
        lambda: grouped_product(torch.randn(4, 8), torch.randn(2, 8, 4), ends.flip(0)),
        lambda: grouped_product(torch.randn(8, 4), torch.randn(5, 4), ends),
    ):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            wrong()


def test_a_frozen_weight_keeps_no_input_and_outputs_may_be_changed_in_place() -> None:
    layer, kept = Linear(24, 40, bias=False), []
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 3, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x[0])
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]
    out.mul_(2).sum().backward()
    torch.testing.assert_close(x.grad[0], 2 * layer.weight.sum(dim=0).expand(3, 24))  # type: ignore[index]


def test_other_dtypes_modes_and_subclasses_keep_torchs_operations(compiled: Products) -> None:
    class Marked(Tensor):
        pass

    a, b = torch.randn(4, 8), torch.randn(8, 4)
    assert chosen._compiled(a, b) is compiled
    assert chosen._compiled(a, b.double()) is None
    assert chosen._compiled(a.bfloat16(), b.bfloat16()) is None
    assert chosen._compiled(a.as_subclass(Marked), b) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen._compiled(a, b) is None
    with FlopCounterMode(display=False) as counter:
        product(a, b)
    assert counter.get_total_flops() == 2 * 4 * 8 * 4
