"""Grouped expert products of one expert-parallel rank: efficiency over the tokens that context parallelism leaves it.

A sequence of 8,192 tokens is cut over CP ranks, so a rank holds 8192 / CP tokens; the EP ranks of a group exchange
them, and each receives as many (token, expert) pairs as its own tokens chose: 8192 / CP * K_e, over N / EP experts.
The pairs of the report's Figure 10 are not given in its text; here EP is 8 and CP 1, 2, 4, 8, as in its mesh of 8.
Source: networks.md section 7, Figure 10: efficiency rises when CP shrinks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from omni_ray.models.grouped_experts import grouped_experts
from pipelines.bench.writer import BenchReport, Figure, alternate, environment, measured

TOKENS = 8192
EXPERT_PARALLEL = 8
EXPERTS, CHOSEN = 512, 8
"""N and K_e as published."""
HIDDEN, INNER = 512, 256
"""Widths of the bench configuration L."""
CONTEXT_PARALLEL = (1, 2, 4, 8)

# M (token, expert) pairs of this rank, H model dim, F inner dim


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Forward and backward of the project's grouped expert function at every CP, alternating, one thread, fp32.

    Args:
        quick: 3 runs in place of 7 (the same sizes).  seed: Draws other weights and routes.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    local = EXPERTS // EXPERT_PARALLEL
    gate_up = 0.06 * torch.randn(local, 2 * INNER, HIDDEN, generator=generator)
    down = 0.06 * torch.randn(local, HIDDEN, INNER, generator=generator)
    works = {cp: _work(cp, gate_up, down, generator) for cp in CONTEXT_PARALLEL}
    sides: dict[str, Callable[[], float]] = {"peak": _peak}
    sides |= {str(cp): work for cp, work in works.items()}
    rates = alternate(sides, 3 if quick else 7, warm_up=lambda: [work() for work in works.values()])
    efficiency = {
        cp: [rate / peak for rate, peak in zip(rates[str(cp)], rates["peak"], strict=True)] for cp in CONTEXT_PARALLEL
    }
    figures = [_curve(efficiency)]
    ratio = [a / b for a, b in zip(efficiency[1], efficiency[8], strict=True)]
    against = f"CP 1 over CP 8 at EP {EXPERT_PARALLEL}, forward and backward"
    figures.append(measured("efficiency_cp1_over_cp8", ratio, unit="ratio", better="higher", goal=1.0, against=against))
    for cp, runs in efficiency.items():
        pairs = TOKENS // cp * CHOSEN
        what = f"{pairs} pairs over {local} experts; share of a plain product's FLOP/s"
        figures.append(measured(f"efficiency_cp{cp}", runs, unit="fraction", better="higher", against=what))
    return BenchReport(bench="moe-gemm", figures=tuple(figures), environment=environment(seed=seed, quick=quick))


def _curve(efficiency: dict[int, list[float]]) -> Figure:
    medians = {cp: sorted(runs)[len(runs) // 2] for cp, runs in efficiency.items()}
    points = [
        {"cp": cp, "ep": EXPERT_PARALLEL, "tokens_per_rank": TOKENS // cp, "efficiency": value}
        for cp, value in medians.items()
    ]
    return Figure(
        name="efficiency_curve",
        value=max(medians.values()),
        unit="fraction",
        better="higher",
        against="best of the curve; points under `points`",
        n=len(points),
        runs=tuple(medians.values()),
        extra={"points": points},
    )


def _work(cp: int, gate_up: Tensor, down: Tensor, generator: torch.Generator) -> Callable[[], float]:
    """FLOP/s of one rank's experts on the pairs that it receives, each pair a row of its own."""
    pairs = TOKENS // cp * CHOSEN
    x_MH = torch.randn(pairs, HIDDEN, generator=generator).requires_grad_()
    expert_M1 = torch.randint(0, len(gate_up), (pairs, 1), generator=generator)
    weight_M1 = torch.rand(pairs, 1, generator=generator).requires_grad_()
    gradient_MH = torch.randn(pairs, HIDDEN, generator=generator)
    held = gate_up.clone().requires_grad_(), down.clone().requires_grad_()

    def once() -> float:
        start = time.perf_counter()
        out_MH = grouped_experts(x_MH, weight_M1, expert_M1, *held)
        torch.autograd.grad(out_MH, (x_MH, weight_M1, *held), gradient_MH)
        # Three matrices of H x F, two operations a value, once forward and twice backward.
        return 3 * 2 * 3 * pairs * HIDDEN * INNER / (time.perf_counter() - start)

    return once


def _peak() -> float:
    """FLOP/s of a plain square product in cache, the machine's own mark."""
    size = 512
    left, right, out = (torch.ones(size, size) for _ in range(3))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
