"""Small parts shared by the networks: RMS norm, gated MLP, row padding.

The norm and the gate have hand-written backwards: a few passes over memory where autograd takes a dozen, one where a
compiler is at hand (0038).
"""

# T packed tokens, H model dim, F inner dim of a gated MLP

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from omni_ray.models.native.layer_passes import LayerPasses, layer_passes
from omni_ray.models.native.library import compiled_takes
from omni_ray.models.products import Linear
from omni_ray.models.recompute import offer

ROW_TILE = 16
"""Row counts that are multiples of this give the same bits per row in a matrix product."""


def rms_scale(x32: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` of every row, [..., 1]."""
    mean = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x32.shape[-1])
    return mean.add_(eps).rsqrt_()


def _rms_norm(x: Tensor, weight: Tensor, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """The norm without a graph, and the factor of every row that its backward needs."""
    compiled = _passes(x, weight) if weight.shape == x.shape[-1:] else None
    if compiled is not None:
        out, scale = compiled.rms(_rows(x), weight.float() * gain, eps)
        return out.view(x.shape), scale.view(*x.shape[:-1], 1)
    x32 = x.float()
    scale = rms_scale(x32, eps)
    gained = weight * gain if gain != 1.0 else weight
    return (x32 * scale).to(x.dtype).mul_(gained), scale


def _passes(*operands: Tensor) -> LayerPasses | None:
    """The compiled passes where they take these operands."""
    return layer_passes(operands[0].dtype) if compiled_takes(*operands) else None


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [R, D] whose values lie beside each other; rows of a slice stay where they are."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.shape[-1] < 2 or rows.stride(-1) == 1 else rows.contiguous()


def rms_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradients of ``x * scale * weight * gain`` with respect to ``x`` and ``weight``; ``scale``: :func:`rms_scale`."""
    x32, grad32 = x.float().flatten(0, -2), grad.float().flatten(0, -2)
    scale, weight32 = scale.flatten(0, -2), weight.float() * gain
    # With s the row's scale: dx = s (g w) - x s^3 mean(g w x), dw = sum over rows of s g x.
    product = grad32 * x32
    grad_weight = (scale.t() @ product).flatten().mul_(gain).to(weight.dtype)
    along = (product @ weight32).unsqueeze(1).mul_(scale.pow(3)).div_(-x.shape[-1])
    grad_x = torch.mul(grad32, weight32, out=product).mul_(scale).addcmul_(x32, along)
    return grad_x.to(x.dtype).view(x.shape), grad_weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, gain: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        out, scale = _rms_norm(x, weight, eps, gain)
        ctx.save_for_backward(x, weight, scale)
        ctx.gain = gain
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        x, weight, scale = ctx.saved_tensors
        compiled = _passes(x, weight, grad) if weight.shape == x.shape[-1:] else None
        if compiled is None:
            return *rms_backward(grad, x, weight, scale, ctx.gain), None, None
        given = (_rows(grad).contiguous(), _rows(x), weight.float() * ctx.gain, scale)
        grad_x, grad_weight = compiled.rms_back(*given)
        return grad_x.view(x.shape), grad_weight.mul_(ctx.gain).to(weight.dtype), None, None


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, gain: float = 1.0) -> Tensor:
    """``gain * weight * x / sqrt(mean(x^2) + eps)``; the statistics in fp32.

    Args:
        x_TH: [..., H].  weight_H: [H].
        eps: Added to the mean square.
        gain: Constant factor; MLA's low-rank scale.
    Returns:
        Shape and dtype of ``x_TH``.
    Source: RMSNorm; networks.md section 4 for the gain.
    """
    if torch.is_grad_enabled():
        out: Tensor = _RmsNorm.apply(x_TH, weight_H, eps, gain)
        offer(out, lambda: _rms_norm(x_TH, weight_H, eps, gain)[0])
        return out
    return _rms_norm(x_TH, weight_H, eps, gain)[0]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain; statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TH: Tensor) -> Tensor:
        """[..., size], any float dtype, to the same shape and dtype."""
        return rms_norm(x_TH, self.weight, self.eps)


def swiglu_forward(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up`` without a graph, and silu(gate), which spares the backward an exponential."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    return activated * up, activated


def swiglu_backward(grad: Tensor, gate_up: Tensor, activated: Tensor) -> Tensor:
    """Gradient of :func:`swiglu_forward` with respect to ``gate_up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        compiled = _passes(gate_up)
        if compiled is not None:
            ctx.save_for_backward(gate_up)
            return compiled.swiglu(_rows(gate_up).contiguous()).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        out, activated = swiglu_forward(gate_up)
        offer(activated, lambda: F.silu(gate_up.chunk(2, dim=-1)[0]))
        ctx.save_for_backward(gate_up, activated)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        gate_up, *activated = ctx.saved_tensors
        if activated:
            return swiglu_backward(grad, gate_up, *activated)
        compiled = layer_passes(gate_up.dtype)
        assert compiled is not None
        return compiled.swiglu_back(_rows(grad).contiguous(), _rows(gate_up).contiguous())[0].view(gate_up.shape)


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """``silu(gate) * up`` of a joint projection, gate first.  [..., 2F] -> [..., F]."""
    out: Tensor = _SwiGlu.apply(gate_up_TF2)
    if torch.is_grad_enabled():
        offer(out, lambda: _SwiGlu.apply(gate_up_TF2))
    return out


def weighted_swiglu(gate_up_MF2: Tensor, share_M1: Tensor) -> Tensor:
    """:func:`swiglu` times an fp32 factor of every row, without a graph.  [M, 2F], [M, 1] -> [M, F]."""
    compiled = _passes(gate_up_MF2)
    if compiled is not None:
        return compiled.swiglu(gate_up_MF2.contiguous(), share_M1.float().contiguous())
    return swiglu_forward(gate_up_MF2)[0].mul_(share_M1.to(gate_up_MF2.dtype))


def weighted_swiglu_backward(grad_MF: Tensor, gate_up_MF2: Tensor, share_M1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`weighted_swiglu` for both, [M, 2F] and [M] in fp32, and its result again, [M, F]."""
    compiled = _passes(grad_MF, gate_up_MF2)
    if compiled is not None:
        given = (grad_MF.contiguous(), gate_up_MF2.contiguous(), share_M1.float().contiguous())
        grad_gate_up, along_M, again_MF = compiled.swiglu_back(*given)
        assert along_M is not None
        assert again_MF is not None
        return grad_gate_up, along_M, again_MF
    share_M1 = share_M1.to(grad_MF.dtype)
    unweighted, activated = swiglu_forward(gate_up_MF2)
    along_M = (grad_MF * unweighted).sum(dim=1, dtype=torch.float32)
    grad_gate_up = swiglu_backward(grad_MF * share_M1, gate_up_MF2, activated)
    return grad_gate_up, along_M, unweighted.mul_(share_M1)


class GatedMLP(nn.Module):
    """``W_down(silu(W_gate x) * W_up x)`` with gate and up held as one matrix (split on disk)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * inner_size, bias=False)
        self.down_proj = Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out_TH: Tensor = self.down_proj(swiglu(self.gate_up_proj(x_TH)))
        return out_TH


def row_padded(function: Callable[[Tensor], Tensor], x_TH: Tensor, tile: int = ROW_TILE) -> Tensor:
    """Apply a row-wise function with the row count rounded up to a multiple of ``tile``.

    The bits of a matrix product depend on its row count; multiples of 16 agree (measured, see docs), so a row's
    result does not feel how many other rows share the call.

    Args:
        function: Maps [T, ...] to [T, ...], each row by itself.
        x_TH: Rows first.
        tile: Rows are rounded up to a multiple of this.
    Returns:
        The first T rows of ``function(x padded with zeros)``.
    """
    rows = x_TH.shape[0]
    missing = -rows % tile
    if missing == 0:
        return function(x_TH)
    padded = torch.cat([x_TH, x_TH.new_zeros((missing, *x_TH.shape[1:]))])
    return function(padded)[:rows]
