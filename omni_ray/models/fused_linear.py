"""Linears of the encoders with their bias, activation or residual inside the product (docs/decisions).

On the CPU in fp32 this is oneDNN's product over weights laid out once for its kernel: what follows the product
happens while a tile is in registers, where separate operations take two more trips over the widest activations. Values
have the same bits with and without a graph. Elsewhere the plain operations run.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omni_ray.models.changed_weights import state_of
from omni_ray.models.products import product

# R rows, K inputs, N outputs

_ROWS_HINT = 256
"""Rows that the layout is chosen for; the bits do not depend on it."""
_LAID_OUT: WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


def _laid_out(linear: nn.Linear) -> Tensor:
    """The weight in the kernel's order; made again when the weight has moved or changed."""
    weight_NK = linear.weight
    key = state_of(weight_NK)
    held = _LAID_OUT.get(linear)
    if held is None or held[0] != key:
        held = (key, torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), _ROWS_HINT))
        _LAID_OUT[linear] = held
    return held[1]


def _fused(x: Tensor, linear: nn.Linear) -> bool:
    fits = x.is_cpu and x.dtype == linear.weight.dtype == torch.float32 and not linear.weight.is_inference()
    return fits and torch.backends.mkldnn.is_available()


def _product(x_RK: Tensor, laid_out: Tensor, bias_N: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x_RK, laid_out, bias_N, "none", [], ""))


def _relu6_product(x_RK: Tensor, laid_out: Tensor, bias_N: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x_RK, laid_out, bias_N, "hardtanh", [0.0, 6.0], ""))


def _add_product(x_RK: Tensor, laid_out: Tensor, bias_N: Tensor | None, other_RN: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(x_RK, other_RN, laid_out, bias_N, "add"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, laid_out: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x_RK, weight_NK)
        return _product(x_RK, laid_out, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):  # type: ignore[no-untyped-def, override]
        return *_linear_gradients(ctx.needs_input_grad, grad_RN, *ctx.saved_tensors), None


class _LinearRelu6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, laid_out: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        out_RN = _relu6_product(x_RK, laid_out, bias_N)
        ctx.save_for_backward(x_RK, weight_NK, out_RN)
        return out_RN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):  # type: ignore[no-untyped-def, override]
        x_RK, weight_NK, out_RN = ctx.saved_tensors
        inside_RN = torch.ops.aten.hardtanh_backward(grad_RN, out_RN, 0.0, 6.0)
        return *_linear_gradients(ctx.needs_input_grad, inside_RN, x_RK, weight_NK), None


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, other_RN: Tensor, laid_out: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_RK, weight_NK)
        return _add_product(x_RK, laid_out, bias_N, other_RN)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):  # type: ignore[no-untyped-def, override]
        return *_linear_gradients(ctx.needs_input_grad, grad_RN, *ctx.saved_tensors), grad_RN, None


def _linear_gradients(
    needed: tuple[bool, ...], grad_RN: Tensor, x_RK: Tensor, weight_NK: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, as autograd makes them for a linear."""
    return (
        product(grad_RN, weight_NK) if needed[0] else None,
        product(grad_RN.t(), x_RK) if needed[1] else None,
        grad_RN.sum(dim=0) if needed[2] else None,
    )


def linear(layer: nn.Linear, x_RK: Tensor) -> Tensor:
    """``layer(x)``.

    Args:
        layer: With or without a bias.
        x_RK: [R, K].
    Returns:
        [R, N].
    """
    if not _fused(x_RK, layer):
        plain_RN: Tensor = layer(x_RK)
        return plain_RN
    if torch.is_grad_enabled():
        out_RN: Tensor = _Linear.apply(x_RK, layer.weight, layer.bias, _laid_out(layer))
        return out_RN
    return _product(x_RK, _laid_out(layer), layer.bias)


def linear_relu6(linear: nn.Linear, x_RK: Tensor) -> Tensor:
    """``relu6(linear(x))``.

    Args:
        linear: With or without a bias.
        x_RK: [R, K].
    Returns:
        [R, N].
    """
    if not _fused(x_RK, linear):
        return F.relu6(linear(x_RK), inplace=True)
    if torch.is_grad_enabled():
        out_RN: Tensor = _LinearRelu6.apply(x_RK, linear.weight, linear.bias, _laid_out(linear))
        return out_RN
    return _relu6_product(x_RK, _laid_out(linear), linear.bias)


def linear_add(linear: nn.Linear, x_RK: Tensor, other_RN: Tensor) -> Tensor:
    """``linear(x) + other``.

    Args:
        linear: With or without a bias.
        x_RK: [R, K].
        other_RN: The residual, [R, N].
    Returns:
        [R, N].
    """
    if not _fused(x_RK, linear):
        product_RN: Tensor = linear(x_RK)
        return product_RN.add_(other_RN)
    if torch.is_grad_enabled():
        out_RN: Tensor = _LinearAdd.apply(x_RK, linear.weight, linear.bias, other_RN, _laid_out(linear))
        return out_RN
    return _add_product(x_RK, _laid_out(linear), linear.bias, other_RN)
