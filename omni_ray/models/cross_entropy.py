"""Cross-entropy of a linear head without the logits of all rows: chunk by chunk, the gradient made in the forward."""

# R rows, H model dim, V vocabulary, C rows of one chunk

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_ray.models.native.layer_passes import layer_passes
from omni_ray.models.native.library import compiled_takes
from omni_ray.models.products import add_product, product

CHUNK_ROWS = 512
"""Rows whose logits exist at one time."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, factor_R: Tensor):  # type: ignore[no-untyped-def, override]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_RH.dtype, torch.float32)
        ce_R = hidden_RH.new_empty(len(labels_R), dtype=wide)
        grad_hidden = torch.empty_like(hidden_RH) if wants_hidden else None
        # Added up over the chunks in fp32, whatever the dtype of the products.
        grad_weight = weight_VH.new_zeros(weight_VH.shape, dtype=wide) if wants_weight else None
        for start in range(0, len(labels_R), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            hidden, label_C1, factor_C1 = hidden_RH[part], labels_R[part, None], factor_R[part, None].to(wide)
            wanted = wants_hidden or wants_weight
            ce_R[part], slope_CV = _loss_and_slopes(product(hidden, weight_VH.t()), label_C1, wanted)
            if slope_CV is None:
                continue
            # A row's factor is applied on the narrow side of the products.
            if grad_hidden is not None:
                grad_hidden[part] = product(slope_CV, weight_VH).mul_(factor_C1.to(hidden.dtype))
            if grad_weight is not None:
                add_product(grad_weight, slope_CV.t(), hidden * factor_C1.to(hidden.dtype))
            del slope_CV  # before the next chunk's logits are made
        ctx.kept = (grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype))
        ctx.mark_non_differentiable(ce_R)
        return ce_R.dot(factor_R.to(wide)), ce_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):  # type: ignore[no-untyped-def, override]
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise RuntimeError("the gradient of linear_cross_entropy is made once; run the forward again")
        # The usual seed is 1, and then there is nothing to multiply; a GPU is not asked, for that would wait for it.
        if grad.is_cuda or float(grad) != 1.0:
            kept = tuple(None if x is None else x * grad.to(x.dtype) for x in kept)
        return *kept, None, None


def _loss_and_slopes(logits_CV: Tensor, label_C1: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every row in fp32 at least, and softmax - onehot in place of the logits, in their dtype."""
    compiled = layer_passes(logits_CV.dtype) if compiled_takes(logits_CV) else None
    if compiled is not None:
        loss_C = compiled.cross_entropy(logits_CV, label_C1.squeeze(1), slopes=wanted)
        return loss_C, logits_CV if wanted else None
    log_CV = F.log_softmax(logits_CV, dim=-1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
    loss_C = log_CV.gather(1, label_C1).squeeze(1).neg_()
    if not wanted:
        return loss_C, None
    slope_CV = log_CV.exp_().scatter_add_(1, label_C1, log_CV.new_full((1, 1), -1.0).expand_as(label_C1))
    return loss_C, slope_CV.to(logits_CV.dtype)


def linear_cross_entropy(
    hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, factor_R: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_r factor_r * CE(hidden_r W^T, label_r)``; at most ``CHUNK_ROWS`` rows of logits exist at any time.

    Args:
        hidden_RH: [R, H].  weight_VH: [V, H] of the head.
        labels_R: [R] int64 in 0..V-1.
        factor_R: [R] weight of each row; takes no gradient.
    Returns:
        The scalar sum, and [R] cross-entropy of every row without a graph; both fp32 at least.
    Raises:
        RuntimeError: a second backward over the same forward.
    """
    loss, ce_R = _LinearCrossEntropy.apply(hidden_RH, weight_VH, labels_R, factor_R)
    return loss, ce_R
