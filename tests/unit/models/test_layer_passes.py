"""Compiled norms, gates and losses against torch in double precision, and a row's bits among others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.models import cross_entropy, layers
from omni_ray.models.cross_entropy import linear_cross_entropy
from omni_ray.models.layers import rms_norm, swiglu, weighted_swiglu, weighted_swiglu_backward
from omni_ray.models.native.layer_passes import LayerPasses, layer_passes

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = (1, 15, 16, 17, 100)
ROWS = 131

# R rows, D size, F inner size, V vocabulary


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def passes(request: pytest.FixtureRequest) -> tuple[LayerPasses, torch.dtype]:
    found = layer_passes(request.param)
    if found is None:
        pytest.skip("no C compiler" if layer_passes(FP32) is None else "this processor multiplies no pairs of bf16")
    return found, request.param


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    rounding = 2**-7 if dtype == BF16 else 2e-5
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("apart", [False, True])
def test_norm(passes: tuple[LayerPasses, torch.dtype], size: int, apart: bool) -> None:
    functions, dtype = passes
    x = 3 * drawn(ROWS, size + 4 * apart, dtype=dtype)[:, 2 * apart : 2 * apart + size]
    gain, grad = 1 + drawn(size, dtype=FP32).abs(), drawn(ROWS, size, dtype=dtype, seed=5)
    out, scale = functions.rms(x, gain, 1e-5)
    exact, weight = x.double().requires_grad_(), gain.double().requires_grad_()
    wanted = F.rms_norm(exact, (size,), weight, 1e-5)
    wanted.backward(grad.double())
    grad_x, grad_gain = functions.rms_back(grad, x, gain, scale)
    for found, expected in ((out, wanted.detach()), (grad_x, exact.grad), (grad_gain, weight.grad)):
        assert expected is not None
        close(found, expected, dtype)
    assert grad_gain.dtype == FP32
    assert torch.equal(functions.rms(x[77:78], gain, 1e-5)[0], out[77:78])


@pytest.mark.parametrize("size", SIZES)
def test_gate_and_its_share(passes: tuple[LayerPasses, torch.dtype], size: int) -> None:
    functions, dtype = passes
    gate_up, grad = 4 * drawn(ROWS, 2 * size, dtype=dtype), drawn(ROWS, size, dtype=dtype, seed=3)
    share = drawn(ROWS, 1, dtype=FP32).abs()
    exact, exact_share = gate_up.double().requires_grad_(), share.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    wanted = F.silu(gate) * up * exact_share
    wanted.backward(grad.double())
    close(functions.swiglu(gate_up, share), wanted.detach(), dtype)
    close(functions.swiglu(gate_up), (F.silu(gate) * up).detach(), dtype)
    grad_gate_up, along, again = functions.swiglu_back(grad, gate_up, share)
    assert along is not None
    assert again is not None
    assert exact_share.grad is not None
    close(grad_gate_up, exact.grad, dtype)  # type: ignore[arg-type]
    bound = 1e-4 if dtype == BF16 else 2e-7  # the quotient of bf16's sigmoid is right to 6e-5
    assert (along.double() - exact_share.grad[:, 0]).norm() < bound * exact_share.grad.norm()
    assert torch.equal(again, functions.swiglu(gate_up, share))
    plain, none, nothing = functions.swiglu_back(grad, gate_up)
    assert none is nothing is None
    ones, _, _ = functions.swiglu_back(grad, gate_up, torch.ones(ROWS, 1))
    assert torch.equal(plain, ones)
    assert torch.equal(functions.swiglu(gate_up[70:71]), functions.swiglu(gate_up)[70:71])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_loss_and_slopes(passes: tuple[LayerPasses, torch.dtype], size: int, scale: float) -> None:
    functions, dtype = passes
    logits = scale * drawn(ROWS, size, dtype=dtype)
    labels = torch.randint(0, size, (ROWS,), generator=torch.Generator().manual_seed(1))
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    kept = logits.clone()
    torch.testing.assert_close(
        functions.cross_entropy(kept, labels, slopes=False).double(), wanted.detach(), rtol=1e-5, atol=2e-5
    )
    assert torch.equal(kept, logits), "without slopes the logits stay"
    functions.cross_entropy(kept, labels, slopes=True)
    close(kept, exact.grad, dtype)  # type: ignore[arg-type]


def test_what_is_no_number_is_told_and_a_foreign_label_is_refused(passes: tuple[LayerPasses, torch.dtype]) -> None:
    functions, dtype = passes
    x = drawn(3, 40, dtype=dtype)
    x[1, 7] = math.nan
    labels = torch.zeros(3, dtype=torch.int64)
    found = (
        functions.rms(x, torch.ones(40), 1e-5)[0].isnan().any(dim=1),
        functions.swiglu(x).isnan().any(dim=1),
        functions.cross_entropy(x.clone(), labels, slopes=False).isnan(),
    )
    assert all(spoilt.tolist() == [False, True, False] for spoilt in found)
    for label in (-1, -100, 40):
        labels[2] = label
        with pytest.raises(IndexError, match=f"label {label} lies outside of the vocabulary, 0 to 39"):
            functions.cross_entropy(x, labels, slopes=True)


def test_sizes_that_do_not_belong_together_are_refused(passes: tuple[LayerPasses, torch.dtype]) -> None:
    functions, dtype = passes
    x, share = drawn(6, 40, dtype=dtype), torch.ones(6, 1)
    for wrong in (
        lambda: functions.rms(x, torch.ones(39), 1e-5),
        lambda: functions.rms(x, torch.ones(40, dtype=torch.float64), 1e-5),
        lambda: functions.swiglu(x[:, :39].contiguous()),
        lambda: functions.swiglu(x, share[:1]),
        lambda: functions.swiglu_back(x, x),
        lambda: functions.cross_entropy(x, torch.zeros(2, dtype=torch.int64), slopes=False),
        lambda: functions.cross_entropy(x[:, ::2], torch.zeros(6, dtype=torch.int64), slopes=False),
    ):
        with pytest.raises(RuntimeError, match="sizes do not belong together"):
            wrong()
    labels = torch.tensor([1, 0, 3, 0, 39, 7])
    wanted = functions.cross_entropy(x, labels, slopes=False)
    assert torch.equal(functions.cross_entropy(x, labels.int(), slopes=False), wanted)


def test_a_gain_that_torch_would_spread_or_refuse(passes: tuple[LayerPasses, torch.dtype]) -> None:
    x = drawn(6, 40, dtype=passes[1])
    one = torch.full((1,), 2.0, dtype=passes[1])
    torch.testing.assert_close(rms_norm(x, one, 1e-5), rms_norm(x, one.expand(40).contiguous(), 1e-5))
    with pytest.raises(RuntimeError, match="must match"):
        rms_norm(x, one.expand(8).contiguous(), 1e-5)


def works(dtype: torch.dtype) -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    """What the networks call, and its inputs."""
    labels = torch.arange(ROWS) % 50
    factor = torch.full((ROWS,), 1.0 / ROWS)
    return [
        (lambda x, w: rms_norm(x, w, 1e-5, 1.5), [drawn(5, 7, 24, dtype=dtype), 1 + drawn(24, dtype=dtype)]),
        (lambda x: swiglu(x), [drawn(5, 7, 24, dtype=dtype)]),
        (
            lambda h, w: linear_cross_entropy(h, w, labels, factor)[0],
            [drawn(ROWS, 24, dtype=dtype), drawn(50, 24, dtype=dtype)],
        ),
    ]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on there is no compiler."""

    def switch() -> None:
        for module in (layers, cross_entropy):
            monkeypatch.setattr(module, "layer_passes", lambda _: None)

    return switch


def test_the_form_without_a_compiler_agrees(
    passes: tuple[LayerPasses, torch.dtype], without: Callable[[], None]
) -> None:
    _, dtype = passes

    def all_of() -> list[Tensor]:
        made: list[Tensor] = []
        for function, inputs in works(dtype):
            given = [x.clone().requires_grad_() for x in inputs]
            out = function(*given)
            out.backward(torch.ones_like(out))
            made += [out.detach(), *(x.grad for x in given if x.grad is not None)]
        made += [weighted_swiglu(works(dtype)[1][1][0][0], torch.arange(7.0).unsqueeze(1))]
        made += weighted_swiglu_backward(
            drawn(7, 12, dtype=dtype), works(dtype)[1][1][0][0], torch.arange(7.0).unsqueeze(1)
        )
        return made

    compiled, bound = all_of(), 3e-2 if dtype == BF16 else 1e-5
    without()
    for found, plain in zip(compiled, all_of(), strict=True):
        assert found.dtype == plain.dtype
        torch.testing.assert_close(found, plain, rtol=bound, atol=bound)


def test_the_same_bits_on_two_threads(passes: tuple[LayerPasses, torch.dtype], two_threads: None) -> None:
    functions, dtype = passes
    x, grad, gain = drawn(500, 48, dtype=dtype), drawn(500, 48, dtype=dtype, seed=2), torch.ones(48)

    def all_of() -> list[Tensor]:
        out, scale = functions.rms(x, gain, 1e-5)
        logits = x.clone()
        loss = functions.cross_entropy(logits, torch.arange(500) % 48, slopes=True)
        half = grad[:, :24].contiguous()
        return [out, *functions.rms_back(grad, x, gain, scale), functions.swiglu_back(half, x)[0], loss, logits]

    many = all_of()
    torch.set_num_threads(1)
    for found, one in zip(many, all_of(), strict=True):
        assert torch.equal(found, one)
