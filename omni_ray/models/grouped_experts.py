"""FFN experts on the tokens that chose them: rows sorted by expert, one grouped product per matrix.

Zero-computation experts never enter: their share of a token is added as ``u * (sum of their weights)``.
"""

# T packed tokens, K chosen per token, M chosen (token, FFN expert) pairs, N FFN experts, H model dim, F inner dim

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_ray.models.large_pages import in_large_pages
from omni_ray.models.layers import weighted_swiglu, weighted_swiglu_backward
from omni_ray.models.products import grouped_gradient, grouped_product

BLOCK_ROWS = 4096
"""Most rows that are worked on together: 0.60 of the matmul peak where 65,536 rows at once reach 0.48."""


class _Block(NamedTuple):
    """Consecutive rows, and the experts that they belong to."""

    experts: slice
    rows: slice
    ends_E: Tensor
    """Ends of these experts' rows inside the block."""


def _blocks(ends_N: Tensor) -> list[_Block]:
    """Blocks of at most :data:`BLOCK_ROWS` rows that end with an expert, where that expert alone is not longer.

    One block where kernels run behind the program's back: reading the ends would wait for them.
    """
    if ends_N.device.type != "cpu":
        return [_Block(slice(None), slice(None), ends_N)]
    bounds: list[tuple[int, int, int, int]] = []
    first = begin = 0
    ends = ends_N.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        if end - begin > BLOCK_ROWS and start > begin:
            bounds.append((first, expert, begin, start))
            first, begin = expert, start
        while end - begin > BLOCK_ROWS:
            bounds.append((expert, expert + 1, begin, begin + BLOCK_ROWS))
            first, begin = expert, begin + BLOCK_ROWS
    bounds.append((first, len(ends), begin, ends[-1]))
    return [
        _Block(slice(e, f), slice(r, s), (ends_N[e:f] - r).clamp_(0, s - r)) for e, f, r, s in bounds if s > r or r == 0
    ]


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        count = gate_up.shape[0]
        flat = expert_TK.flatten()
        per_expert = torch.bincount(flat, minlength=count)[:count]
        chosen_M = flat.argsort(stable=True)[: int(per_expert.sum())]
        token_M = chosen_M // expert_TK.shape[1]
        share_M1 = weight_TK.flatten().index_select(0, chosen_M).unsqueeze(1)
        out = torch.zeros_like(u)
        kept: list[Tensor] = []
        ctx.blocks = _blocks(per_expert.cumsum(0).to(torch.int32))
        for experts, rows, ends_E in ctx.blocks:
            hidden = grouped_product(u.index_select(0, token_M[rows]), gate_up[experts].transpose(1, 2), ends_E)
            kept.append(hidden)
            # The router's weight rides on the inner activations, so no second buffer of outputs is needed.
            inner = weighted_swiglu(hidden, share_M1[rows])
            out.index_add_(0, token_M[rows], grouped_product(inner, down[experts].transpose(1, 2), ends_E))
        ctx.save_for_backward(u, share_M1, chosen_M, token_M, gate_up, down, *kept)
        ctx.shape_TK = weight_TK.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        u, share_M1, chosen_M, token_M, gate_up, down, *kept = ctx.saved_tensors
        grad_u = torch.zeros_like(grad)
        grad_weight = torch.zeros(ctx.shape_TK, dtype=torch.float32, device=grad.device)
        of_experts = _WeightGradients(gate_up, down)
        for (experts, rows, ends_E), hidden in zip(ctx.blocks, kept, strict=True):
            token_B, share_B1 = token_M[rows], share_M1[rows]
            grad_B = grad.index_select(0, token_B)
            grad_inner = grouped_product(grad_B, down[experts], ends_E)
            grad_hidden, along_B, inner = weighted_swiglu_backward(grad_inner, hidden, share_B1)
            # chosen_M names each (token, choice) once: a copy, never a sum.
            grad_weight.view(-1).index_copy_(0, chosen_M[rows], along_B)
            of_experts.add(experts, ends_E, (grad_hidden.t(), u.index_select(0, token_B)), (grad_B.t(), inner))
            grad_u.index_add_(0, token_B, grouped_product(grad_hidden, gate_up[experts], ends_E))
        return grad_u, grad_weight, None, *of_experts.sums


class _WeightGradients:
    """Gradients of the experts' matrices, block after block: an expert whose rows end in a later block is added up."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self._weights = gate_up, down
        self._begun = 0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, experts: slice, ends_E: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
        """Sums over the block's rows, for each weight of a pair [A, M], [M, B]."""
        count = len(self._weights[0])
        first, end, _ = experts.indices(count)
        if (first, end) == (0, count):
            self.sums = tuple(grouped_gradient(x, grad, ends_E) for x, grad in pairs)
            return
        self.sums = self.sums or tuple(in_large_pages(weight.new_empty(weight.shape)) for weight in self._weights)
        for total, (x, grad) in zip(self.sums, pairs, strict=True):
            before = total[first].clone() if first < self._begun else None
            grouped_gradient(x, grad, ends_E, total[first:end])
            if before is not None:
                total[first].add_(before)
        self._begun = end


def grouped_experts(
    u_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_NFH: Tensor, down_NHF: Tensor
) -> Tensor:
    """Weighted sum of the chosen FFN experts of every token.

    Rows are added to a token in expert order, one after the other, so the bits do not vary from call to call.  They
    are worked on in blocks, for what a block makes on its way fits a cache where that of all rows would not.

    Args:
        u_TH: [T, H].  weight_TK: router weights, fp32.
        expert_TK: Chosen experts; ids of N and more are zero-computation experts and are left out.
        gate_up_NFH: [N, 2F, H], gate first.  down_NHF: [N, H, F].
    Returns:
        [T, H].
    """
    out: Tensor = _GroupedExperts.apply(u_TH, weight_TK, expert_TK, gate_up_NFH, down_NHF)
    return out
