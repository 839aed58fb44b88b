"""The compiled attention against its equation in double precision, at the sizes where panels, strips and pairs end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from omni_ray.models.native.attention import Attention, Operands
from omni_ray.models.native.library import form_of, library
from omni_ray.models.rope import rope_tables

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = [(64, 32, 64), (5, 4, 7), (0, 2, 1), (6, 0, 70), (7, 18, 130), (33, 34, 16)]
"""nope, rotary and value dims: whole vectors and panels, odd ones, none, more than one panel."""
PACKINGS = [[1], [2, 0, 1], [64, 65], [127, 129], [130, 3, 300]]

# T packed rows, h heads, d = nope + R query and key dim, e value dim


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def compiled(request: pytest.FixtureRequest) -> tuple[Attention, torch.dtype]:
    """On every processor that has it, whether or not it would be chosen there."""
    found = library()
    if found is None:
        pytest.skip("no C compiler")
    if form_of(found, "attend", request.param) is None:
        pytest.skip("this processor multiplies no pairs of bf16")
    return Attention(found, request.param), request.param


def drawn(
    lengths: list[int], sizes: tuple[int, int, int], dtype: torch.dtype, heads: int = 2
) -> tuple[Operands, Tensor]:
    """Operands, rotary keys a slice of wider rows, and a gradient of the result."""
    (nope, rope, value), heads = sizes, 2
    chance = torch.Generator().manual_seed(sum(lengths))
    rows = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=chance).to(dtype)

    q = normal(heads, nope + rope) * (nope + rope) ** -0.5
    kv, k_rope = normal(heads, nope + value), normal(rope + 3)[:, 3:]
    cos, sin = rope_tables(torch.arange(rows), rope, 100.0) if rope else (torch.empty(rows, 0),) * 2
    return Operands(q, kv, k_rope, cos, sin), normal(heads, value)


def ends_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def exact(operands: Operands, ends: list[int], grad: Tensor) -> list[Tensor]:
    """Result, its softmax's logarithms, and gradients, all in double precision."""
    q, kv, k_rope = (x.double().requires_grad_() for x in operands[:3])
    nope = q.shape[2] - k_rope.shape[1]
    cos, sin = operands.cos_TP.double(), operands.sin_TP.double()

    def turned(x: Tensor) -> Tensor:
        c, s = (y.view(len(y), *[1] * (x.dim() - 2), -1) for y in (cos, sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)

    query = torch.cat([q[..., :nope], turned(q[..., nope:])], dim=-1)
    key = torch.cat([kv[..., :nope], turned(k_rope).unsqueeze(1).expand(-1, q.shape[1], -1)], dim=-1)
    outs, logs = [], []
    for start, end in itertools.pairwise(ends):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end])
        scores = scores.masked_fill(torch.ones(end - start, end - start, dtype=torch.bool).triu(1), -math.inf)
        outs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), kv[start:end, :, nope:]))
        logs.append(scores.logsumexp(-1))
    out = torch.cat(outs)
    out.backward(grad.double())
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (q, kv, k_rope)]
    return [out.detach(), torch.cat(logs, dim=1).detach(), *grads]


def made(compiled: Attention, operands: Operands, ends: list[int], grad: Tensor) -> list[Tensor]:
    out, log_sum = compiled.forward(operands, ends)
    return [out, log_sum, *compiled.backward(operands, ends, out, log_sum, grad)]


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_equation(
    compiled: tuple[Attention, torch.dtype], sizes: tuple[int, int, int], lengths: list[int]
) -> None:
    functions, dtype = compiled
    operands, grad = drawn(lengths, sizes, dtype)
    ends = ends_of(lengths)
    bound = 2e-2 if dtype == BF16 else 1e-5
    names = ("out", "log_sum", "grad_q", "grad_kv", "grad_k_rope")
    all_made, all_exact = made(functions, operands, ends, grad), exact(operands, ends, grad)
    for name, found, wanted in zip(names, all_made, all_exact, strict=True):
        if wanted.numel():
            assert bool(found.isfinite().all()), name
            error = float((found.double() - wanted).norm() / wanted.norm().clamp_min(float(grad.double().norm())))
            assert error < bound, f"{name}: {error}"


def test_a_sequences_bits_feel_neither_neighbours_nor_threads(
    compiled: tuple[Attention, torch.dtype], two_threads: None
) -> None:
    functions, dtype = compiled
    lengths = [70, 1, 140, 33]
    operands, grad = drawn(lengths, (6, 4, 9), dtype)
    together = made(functions, operands, ends_of(lengths), grad)
    torch.set_num_threads(1)
    for found, again in zip(together, made(functions, operands, ends_of(lengths), grad), strict=True):
        assert torch.equal(found, again)
    for start, end in itertools.pairwise(ends_of(lengths)):
        alone = made(functions, Operands(*(x[start:end] for x in operands)), [0, end - start], grad[start:end])
        for place, (one, all_) in enumerate(zip(alone, together, strict=True)):
            assert torch.equal(one, all_[:, start:end] if place == 1 else all_[start:end])


def test_no_row_feels_the_future_and_no_bad_number_is_lost(compiled: tuple[Attention, torch.dtype]) -> None:
    functions, dtype = compiled
    operands, _ = drawn([100], (8, 4, 8), dtype)
    before, _ = functions.forward(operands, [0, 100])
    operands.kv_Thne[57:] *= -3
    after, _ = functions.forward(operands, [0, 100])
    assert torch.equal(before[:57], after[:57])
    assert not torch.equal(before[57], after[57])
    operands.q_Thd[31, 1, 0] = math.nan
    spoilt, _ = functions.forward(operands, [0, 100])
    assert bool(spoilt[31, 1].isnan().all())
    assert bool(spoilt[30].isfinite().all())
    operands.kv_Thne[57, 0, 0] = math.nan
    spoilt, _ = functions.forward(operands, [0, 100])
    assert bool(spoilt[57:, 0].isnan().all())


def test_huge_scores_stay_finite(compiled: tuple[Attention, torch.dtype]) -> None:
    functions, dtype = compiled
    operands, grad = drawn([90], (8, 4, 8), dtype)
    operands.q_Thd[:] *= 300
    assert all(bool(x.isfinite().all()) for x in made(functions, operands, [0, 90], grad))


def test_what_does_not_belong_together_is_refused(compiled: tuple[Attention, torch.dtype]) -> None:
    functions, dtype = compiled
    good, _ = drawn([9], (6, 4, 5), dtype)
    functions.forward(good, [0, 9])
    for bad, ends in (
        (good, [0, 8]),
        (good, [0, 6, 4, 9]),
        (good, [3, 9]),
        (good, []),
        (good._replace(kv_Thne=good.kv_Thne[:8]), [0, 9]),
        (good._replace(k_rope_TR=good.k_rope_TR[:, :3]), [0, 9]),
        (good._replace(cos_TP=good.cos_TP[:, :1]), [0, 9]),
        (good._replace(q_Thd=good.q_Thd.transpose(0, 1).contiguous().transpose(0, 1)), [0, 9]),
    ):
        with pytest.raises(RuntimeError, match="attention cannot take"):
            functions.forward(bad, ends)
