"""The compiled passes of the vision encoder against torch's operations, and the bits of a row among others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from omni_ray.models import vision_passes
from omni_ray.models.layers import RMSNorm
from omni_ray.models.native.passes import passes
from omni_ray.models.vision_passes import PackedGrids, add_scaled, attend, gate_norm, norm

pytestmark = pytest.mark.skipif(passes() is None, reason="no C compiler")

HEADS, HEAD, INNER = 3, 32, 80
SIZE = HEADS * HEAD
WINDOWS = ((2, 1), (1, 5), (3, 16), (1, 63), (2, 64), (1, 65), (1, 150))
ROWS = sum(count * length for count, length in WINDOWS)

COMPILED = {"_NormBackward", "_AddScaledBackward", "_GateNormBackward", "_AttendBackward"}

# R rows, D hidden size, F inner size


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def packed_as(windows: Sequence[tuple[int, int]]) -> PackedGrids:
    rows = sum(count * length for count, length in windows)
    angles_R1e = drawn(rows, 1, HEAD // 2, seed=3)
    return PackedGrids(None, tuple(windows), angles_R1e.cos(), angles_R1e.sin())


def gain(size: int, seed: int) -> RMSNorm:
    part = RMSNorm(size, eps=1e-5)
    with torch.no_grad():
        part.weight.add_(0.3 * drawn(size, seed=seed))
    return part


def works() -> dict[str, tuple[Callable[..., Tensor], list[Tensor], list[nn.Parameter]]]:
    """Each pass as a function of its inputs; inputs; parameters."""
    norm_D, query_D, key_D, norm_F = gain(SIZE, 1), gain(SIZE, 2), gain(SIZE, 3), gain(INNER, 4)
    scale_D = nn.Parameter(drawn(SIZE, seed=9))
    windows = packed_as(WINDOWS)
    return {
        "norm": (lambda x: norm(x, norm_D), [3 * drawn(ROWS, SIZE)], [norm_D.weight]),
        "add_scaled": (
            lambda x, y: add_scaled(x, scale_D, y),
            [drawn(ROWS, SIZE), drawn(ROWS, SIZE, seed=1)],
            [scale_D],
        ),
        "gate_norm": (
            lambda g, u: gate_norm(g, u, norm_F),
            [30 * drawn(ROWS, INNER), drawn(ROWS, INNER, seed=1)],
            [norm_F.weight],
        ),
        "attend": (
            lambda x: attend(x, query_D, key_D, HEADS, windows),
            [2 * drawn(ROWS, 3 * SIZE)],
            [query_D.weight, key_D.weight],
        ),
    }


@pytest.mark.parametrize("name", ["norm", "add_scaled", "gate_norm", "attend"])
def test_values_and_gradients_are_those_of_the_plain_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work, inputs, parameters = works()[name]
    found = []
    for form in ("compiled", "plain"):
        if form == "plain":
            monkeypatch.setattr(vision_passes, "passes", lambda: None)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = work(*leaves)
        upstream = drawn(*out.shape, seed=5)
        found.append([out.detach(), *torch.autograd.grad(out, [*leaves, *parameters], upstream)])
        made_by = str(type(out.grad_fn).__name__)
        assert (made_by in COMPILED) == (form == "compiled"), "the test would compare one form with itself"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["norm", "add_scaled", "gate_norm", "attend"])
def test_bits_do_not_depend_on_a_graph_or_on_threads(name: str) -> None:
    work, inputs, _ = works()[name]
    with_graph = work(*(x.clone().requires_grad_() for x in inputs)).detach()
    with torch.no_grad():
        without = work(*(x.clone() for x in inputs))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            shared = work(*(x.clone() for x in inputs))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(with_graph, without)
    assert torch.equal(with_graph, shared)


@torch.no_grad()
def test_a_window_has_the_same_bits_whatever_windows_are_beside_it() -> None:
    query, key = gain(SIZE, 2), gain(SIZE, 3)
    qkv = drawn(ROWS, 3 * SIZE)
    windows = packed_as(WINDOWS)
    together = attend(qkv, query, key, HEADS, windows)
    start = 0
    for count, length in WINDOWS:
        for _ in range(count):
            rows = slice(start, start + length)
            alone = PackedGrids(None, ((1, length),), windows.cos_R1e[rows], windows.sin_R1e[rows])
            assert torch.equal(attend(qkv[rows].clone(), query, key, HEADS, alone), together[rows])
            start += length


@torch.no_grad()
def test_scores_far_apart_stay_finite() -> None:
    query, key = gain(SIZE, 2), gain(SIZE, 3)
    query.weight.mul_(400.0)
    out = attend(drawn(64, 3 * SIZE), query, key, HEADS, packed_as([(1, 64)]))
    assert bool(out.isfinite().all())
    assert float(out.abs().max()) <= float(drawn(64, 3 * SIZE)[:, 2 * SIZE :].abs().max()) * (1 + 1e-5)


@torch.no_grad()
def test_sizes_that_do_not_fill_vectors_take_the_plain_operations() -> None:
    part = RMSNorm(20, eps=1e-5)
    x = drawn(7, 20)
    assert torch.equal(norm(x, part), part(x))
