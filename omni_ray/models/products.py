"""Matrix products of training: compiled where torch's library leaves the processor idle (docs/decisions), else torch's.

Forward and backward, with and without a graph, take the same way, so values and gradients have the same bits.
"""

# R rows, K inputs, N outputs, G groups

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omni_ray.models.large_pages import in_large_pages
from omni_ray.models.native.library import compiled_takes
from omni_ray.models.native.products import Products, products


def _compiled(*operands: Tensor) -> Products | None:
    """The compiled products where they take these operands, which are of one dtype."""
    return products(operands[0].dtype) if compiled_takes(*operands) else None


def product(a_RK: Tensor, b_KN: Tensor) -> Tensor:
    """``a @ b`` without a graph; either may be transposed.  [R, K], [K, N] -> [R, N]."""
    compiled = _compiled(a_RK, b_KN)
    return a_RK @ b_KN if compiled is None else compiled(a_RK, b_KN)


def add_product(total_RN: Tensor, a_RK: Tensor, b_KN: Tensor) -> None:
    """``total += a @ b`` in place, without a graph; ``total`` is contiguous, and fp32 or of the operands' dtype."""
    compiled = _compiled(a_RK, b_KN) if total_RN.dtype == torch.float32 and compiled_takes(total_RN) else None
    if compiled is not None:
        compiled(a_RK, b_KN, total_RN)
    elif total_RN.dtype == a_RK.dtype:
        total_RN.addmm_(a_RK, b_KN)
    else:
        total_RN.add_(a_RK @ b_KN)


def grouped_gradient(x_AM: Tensor, grad_MB: Tensor, ends_G: Tensor, out_GAB: Tensor | None = None) -> Tensor:
    """``x @ grad`` over each group of rows: the gradient of the groups' matrices.

    Args:
        x_AM: [A, M].  grad_MB: [M, B].
        ends_G: [G] int32, end of each group.
        out_GAB: Written to where given; contiguous.
    Returns:
        [G, A, B].
    """
    compiled = _compiled(x_AM, grad_MB)
    if compiled is None:
        made = grouped_product(x_AM, grad_MB, ends_G)
        return made if out_GAB is None else out_GAB.copy_(made)
    if out_GAB is None:
        out_GAB = in_large_pages(x_AM.new_empty(len(ends_G), x_AM.shape[0], grad_MB.shape[1]))
    return compiled.inner_groups(x_AM, grad_MB, ends_G, out_GAB)


def grouped_product(x: Tensor, weight: Tensor, ends_G: Tensor) -> Tensor:
    """Product of each group of rows with its own matrix (or of row groups with row groups), without a graph.

    Args:
        x: [M, A] rows sorted by group, or [A, M].
        weight: [G, A, B], or [M, B] with [A, M] on the left.
        ends_G: [G] int32, end of each group.
    Returns:
        [M, B], or [G, A, B].
    """
    compiled = _compiled(x, weight)
    if compiled is not None:
        make = compiled.inner_groups if weight.dim() == 2 else compiled.groups
        return make(x, weight, ends_G)
    # The CUDA kernel takes bf16 only.
    if (x.device.type == "cpu" or x.dtype == torch.bfloat16) and _aligned(x) and _aligned(weight):
        return F.grouped_mm(x, weight, offs=ends_G)
    bounds = list(itertools.pairwise([0, *ends_G.cpu().tolist()]))
    if weight.dim() == 2:
        return torch.stack([x[:, start:end] @ weight[start:end] for start, end in bounds])
    return torch.cat([x[start:end] @ weight[group] for group, (start, end) in enumerate(bounds)])


def _aligned(tensor: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, which the grouped kernel asks for in half precision."""
    return all(stride == 1 or stride * tensor.element_size() % 16 == 0 for stride in tensor.stride())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK: Tensor, weight_NK: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        of_x, of_weight = ctx.needs_input_grad
        ctx.save_for_backward(x_RK if of_weight else None, weight_NK if of_x else None)
        return product(x_RK, weight_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):  # type: ignore[no-untyped-def, override]
        x_RK, weight_NK = ctx.saved_tensors
        return (
            None if weight_NK is None else product(grad_RN, weight_NK),
            None if x_RK is None else product(grad_RN.t(), x_RK),
        )


def linear(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.t()`` with a graph.  [R, K], [N, K] -> [R, N]."""
    if _compiled(x_RK, weight_NK) is None:
        return F.linear(x_RK, weight_NK)
    out: Tensor = _Linear.apply(x_RK, weight_NK)
    return out


class Linear(nn.Linear):
    """``torch.nn.Linear`` over :func:`product`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if x.dim() < 2 or _compiled(x, self.weight) is None:
            return super().forward(x)
        out = linear(x if x.dim() == 2 else x.flatten(0, -2), self.weight)
        out = out if x.dim() == 2 else out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias
