"""Compiled matrix products: right in every orientation and size, and an element's bits its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from omni_ray.models import products as chosen
from omni_ray.models.native.library import form_of, library
from omni_ray.models.native.products import Products
from omni_ray.models.products import Linear, add_product, grouped_gradient, grouped_product, product
from pipelines.live_bytes import LiveBytes

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Products]:
    """The compiled forms on every processor, whether or not they would be chosen there."""
    found = library()
    if found is None:
        pytest.skip("no C compiler")
    made = {x: Products(found, x) for x in (FP32, BF16) if form_of(found, "product_rows", x) is not None}
    monkeypatch.setattr(chosen, "products", made.get)
    return made


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest, compiled: dict[torch.dtype, Products]) -> torch.dtype:
    """Each dtype that this processor has compiled products of."""
    found: torch.dtype = request.param
    if found not in compiled:
        pytest.skip("this processor multiplies no pairs of bf16")
    return found


def matrix(rows: int, columns: int, kind: str, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    """Plain, transposed, a slice whose rows lie apart, or of no unit step at all."""
    chance = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance).to(dtype)

    if kind == "turned":
        return drawn(columns, rows).t()
    if kind == "slice":
        return drawn(rows, columns + 5)[:, 2 : 2 + columns]
    if kind == "apart":
        return drawn(rows, 2 * columns)[:, ::2]
    return drawn(rows, columns)


def close(found: Tensor, expected: Tensor) -> None:
    """Sums are right to fp32's precision, and then rounded once to that of the result."""
    rounding = 2**-8 if found.dtype == BF16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-4)


KINDS = ("plain", "turned", "slice", "apart")
SIZES = [
    (1, 1, 1),
    (6, 64, 16),
    (5, 63, 17),
    (97, 130, 33),
    (13, 20, 700),
    (100, 2100, 5),
    (500, 70, 2500),
    (3, 70, 0),
    (0, 4, 4),
    (4, 0, 4),
]


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SIZES)
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
def test_equal_the_plain_product(
    rows: int, outputs: int, inputs: int, kinds: tuple[str, str], dtype: torch.dtype
) -> None:
    a, b = matrix(rows, inputs, kinds[0], 0, dtype), matrix(inputs, outputs, kinds[1], 1, dtype)
    found = product(a, b)
    assert found.dtype == dtype
    close(found, a.double() @ b.double())
    total = torch.ones(rows, outputs)
    add_product(total, a, b)
    close(total, 1 + a.double() @ b.double())


@pytest.mark.parametrize("turned", [False, True])
def test_groups_of_rows_and_of_inputs(turned: bool, dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 7, 7, 60, 61], dtype=torch.int32)
    bounds = list(itertools.pairwise([0, *ends.tolist()]))
    x, weight = torch.randn(61, 24).to(dtype), torch.randn(5, 33, 24).to(dtype)
    weights = weight.transpose(1, 2) if turned else weight.transpose(1, 2).contiguous()
    expected = torch.cat([x[s:e].double() @ weights[g].double() for g, (s, e) in enumerate(bounds)])
    close(grouped_product(x, weights, ends), expected)
    other = torch.randn(61, 40).to(dtype)
    inner = torch.stack([x[s:e].double().t() @ other[s:e].double() for s, e in bounds])
    close(grouped_product(x.t(), other, ends), inner)
    room = torch.ones(7, 24, 40, dtype=dtype)
    grouped_gradient(x.t(), other, ends, room[1:6])
    assert torch.equal(room[1:6], grouped_product(x.t(), other, ends))
    assert bool((room[[0, 6]] == 1).all())


@pytest.mark.parametrize("inputs", [1100, 2501])
def test_an_elements_bits_feel_neither_rows_columns_nor_layout(inputs: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(203, inputs).to(dtype), torch.randn(inputs, 300).to(dtype)
    whole = product(a, b)
    for start, end in [(0, 1), (3, 9), (100, 203)]:
        assert torch.equal(product(a[start:end], b), whole[start:end])
        assert torch.equal(product(a, b[:, start:end]), whole[:, start:end])
    assert torch.equal(product(a.t().contiguous().t(), b), whole)
    assert torch.equal(product(a, b.t().contiguous().t()), whole)


def test_the_same_bits_on_two_threads(two_threads: None, dtype: torch.dtype) -> None:
    ends = torch.tensor([10, 200, 210, 400], dtype=torch.int32)
    a, b = torch.randn(400, 90).to(dtype), torch.randn(4, 90, 70).to(dtype)
    wide, turned = torch.randn(90, 900).to(dtype), torch.randn(900, 90).to(dtype).t()

    def made() -> list[Tensor]:
        total = torch.ones(70, 900)
        add_product(total, a[:70], wide)
        few = [product(a[:70], wide), product(a[:70], turned), total]  # columns are shared out, not rows
        return [*few, product(a, b[0]), grouped_product(a, b, ends), grouped_product(a.t(), a, ends)]

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


def test_shapes_that_do_not_fit_are_refused() -> None:
    ends = torch.tensor([2, 4], dtype=torch.int32)
    for wrong in (
        lambda: Linear(24, 40)(torch.randn(4, 100)),
        lambda: product(torch.randn(4, 8), torch.randn(7, 4)),
        lambda: add_product(torch.randn(4, 5), torch.randn(4, 8), torch.randn(8, 4)),
        lambda: add_product(torch.randn(4, 4).t(), torch.randn(4, 8), torch.randn(8, 4)),
        lambda: grouped_gradient(torch.randn(8, 4), torch.randn(4, 5), ends, torch.randn(3, 8, 5)),
        lambda: grouped_gradient(torch.randn(8, 4), torch.randn(4, 5), ends, torch.randn(2, 5, 8).transpose(1, 2)),
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


def test_other_dtypes_modes_and_subclasses_keep_torchs_operations(compiled: dict[torch.dtype, Products]) -> None:
    class Marked(Tensor):
        pass

    a, b = torch.randn(4, 8), torch.randn(8, 4)
    assert chosen._compiled(a, b) is compiled[FP32]
    assert chosen._compiled(a.bfloat16(), b.bfloat16()) is compiled.get(BF16)
    assert chosen._compiled(a, b.bfloat16()) is None
    assert chosen._compiled(a.double(), b.double()) is None
    assert chosen._compiled(a.as_subclass(Marked), b) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen._compiled(a, b) is None
    with FlopCounterMode(display=False) as counter:
        product(a, b)
    assert counter.get_total_flops() == 2 * 4 * 8 * 4
    with LiveBytes() as bytes_:  # sees memory only, and no operation is hidden from it that takes some
        assert chosen._compiled(a, b) is compiled[FP32]
        kept = product(a, b)
    assert bytes_.live >= kept.nbytes


def test_totals_of_other_dtypes_are_added_by_torch() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    total = torch.ones(4, 4, dtype=torch.float64)
    add_product(total, a.double(), b.double())
    close(total, 1 + a.double() @ b.double())
    half = torch.ones(4, 4, dtype=BF16)
    add_product(half, a.bfloat16(), b.bfloat16())
    torch.testing.assert_close(half.double(), 1 + a.double() @ b.double(), rtol=0.05, atol=0.05)
