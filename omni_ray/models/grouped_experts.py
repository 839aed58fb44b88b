"""FFN experts on the tokens that chose them: rows sorted by expert, one grouped product per matrix.

Zero-computation experts never enter: their share of a token is added as ``u * (sum of their weights)``.
"""

# T packed tokens, K chosen per token, M chosen (token, FFN expert) pairs, N FFN experts, H model dim, F inner dim

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_ray.models.layers import swiglu_backward, swiglu_forward
from omni_ray.models.recompute import offer


def grouped_mm(x: Tensor, weight: Tensor, ends_N: Tensor) -> Tensor:
    """Product of each group of rows with its own matrix (or of row groups with row groups).

    Args:
        x: [M, A] rows sorted by group, or [A, M].
        weight: [N, A, B], or [M, B] with [A, M] on the left.
        ends_N: [N] int32, end of each group.
    Returns:
        [M, B], or [N, A, B].
    """
    # The CUDA kernel takes bf16 only.
    if (x.device.type == "cpu" or x.dtype == torch.bfloat16) and _aligned(x) and _aligned(weight):
        return F.grouped_mm(x, weight, offs=ends_N)
    bounds = list(itertools.pairwise([0, *ends_N.tolist()]))
    if weight.dim() == 2:
        return torch.stack([x[:, start:end] @ weight[start:end] for start, end in bounds])
    return torch.cat([x[start:end] @ weight[group] for group, (start, end) in enumerate(bounds)])


def _aligned(tensor: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, which the grouped kernel asks for in half precision."""
    return all(stride == 1 or stride * tensor.element_size() % 16 == 0 for stride in tensor.stride())


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        count = gate_up.shape[0]
        flat = expert_TK.flatten()
        per_expert = torch.bincount(flat, minlength=count)[:count]
        chosen_M = flat.argsort(stable=True)[: int(per_expert.sum())]
        token_M = chosen_M // expert_TK.shape[1]
        ends_N = per_expert.cumsum(0).to(torch.int32)
        share_M1 = weight_TK.flatten().index_select(0, chosen_M).unsqueeze(1).to(u.dtype)
        x = u.index_select(0, token_M)
        hidden = grouped_mm(x, gate_up.transpose(1, 2), ends_N)
        # The router's weight rides on the inner activations, so no second buffer of outputs is needed.
        unweighted, activated = swiglu_forward(hidden)
        inner = unweighted * share_M1
        offer(x, lambda: u.index_select(0, token_M))
        offer(activated, lambda: swiglu_forward(hidden)[1])
        offer(unweighted, lambda: swiglu_forward(hidden)[0])
        ctx.save_for_backward(x, hidden, activated, unweighted, share_M1, chosen_M, token_M, ends_N, gate_up, down)
        ctx.shape_TK = weight_TK.shape
        out = torch.zeros_like(u)
        return out.index_add_(0, token_M, grouped_mm(inner, down.transpose(1, 2), ends_N))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        x, hidden, activated, unweighted, share_M1, chosen_M, token_M, ends_N, gate_up, down = ctx.saved_tensors
        grad_M = grad.index_select(0, token_M)
        grad_inner = grouped_mm(grad_M, down, ends_N)
        # chosen_M names each (token, choice) once: a copy, never a sum.
        grad_weight = torch.zeros(ctx.shape_TK, dtype=torch.float32, device=grad.device)
        grad_weight.view(-1).index_copy_(0, chosen_M, (grad_inner * unweighted).sum(dim=1, dtype=torch.float32))
        grad_down = grouped_mm(grad_M.t(), unweighted * share_M1, ends_N)
        grad_hidden = swiglu_backward(grad_inner.mul_(share_M1), hidden, activated)
        grad_gate_up = grouped_mm(grad_hidden.t(), x, ends_N)
        grad_u = torch.zeros_like(grad).index_add_(0, token_M, grouped_mm(grad_hidden, gate_up, ends_N))
        return grad_u, grad_weight, None, grad_gate_up, grad_down


def grouped_experts(
    u_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_NFH: Tensor, down_NHF: Tensor
) -> Tensor:
    """Weighted sum of the chosen FFN experts of every token.

    Rows are added to a token in expert order, one after the other, so the bits do not vary from call to call.

    Args:
        u_TH: [T, H].  weight_TK: router weights, fp32.
        expert_TK: Chosen experts; ids of N and more are zero-computation experts and are left out.
        gate_up_NFH: [N, 2F, H], gate first.  down_NHF: [N, H, F].
    Returns:
        [T, H].
    """
    out: Tensor = _GroupedExperts.apply(u_TH, weight_TK, expert_TK, gate_up_NFH, down_NHF)
    return out
