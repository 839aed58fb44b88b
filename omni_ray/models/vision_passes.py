"""What the vision encoder does between its matrix products: norms, gates, rotary turns, attention inside windows.

On the CPU in fp32 these are compiled passes where a compiler is at hand (docs/decisions), with the same bits with and
without a graph; elsewhere torch's operations.  Gradients are torch's operations in both.
"""

# R packed rows, D hidden size, F inner size, h heads, d head size, e = d / 2 angles, L rows of a window

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_ray.models.layers import RMSNorm, rms_backward, rms_scale
from omni_ray.models.native.passes import Passes, passes


@dataclass(frozen=True, slots=True)
class PackedGrids:
    """How packed patches fall into attention windows: one window is one frame pair of one item."""

    order_R: Tensor | None
    """[R] rows sorted by window size, so that equal windows are neighbours; None when they already are."""
    windows: tuple[tuple[int, int], ...]
    """(number of windows, patches in each) of every run of equal windows, in sorted order."""
    cos_R1e: Tensor
    """[R, 1, head size / 2] cosines of the rotation, in sorted order."""
    sin_R1e: Tensor
    """The sines."""


def rotate(x_Rhd: Tensor, cos_R1e: Tensor, sin_R1e: Tensor) -> Tensor:
    """Turn every pair (i, i + d/2) of a head by its angle (rotate-half pairing)."""
    first, second = x_Rhd.chunk(2, dim=-1)
    cos, sin = cos_R1e.to(x_Rhd.dtype), sin_R1e.to(x_Rhd.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm(x_RD: Tensor, part: RMSNorm) -> Tensor:
    """``part(x)``, [R, D]."""
    compiled = _compiled(x_RD, part.weight)
    if compiled is None:
        plain_RD: Tensor = part(x_RD)
        return plain_RD
    if not torch.is_grad_enabled():
        return compiled.norm(x_RD, part.weight, part.eps)
    out_RD: Tensor = _Norm.apply(x_RD, part.weight, part.eps, compiled)
    return out_RD


def add_scaled(x_RD: Tensor, scale_D: Tensor, update_RD: Tensor) -> Tensor:
    """``x + scale * update`` (LayerScale); without a graph in the update's own memory."""
    compiled = _compiled(x_RD, update_RD, scale_D)
    if torch.is_grad_enabled():
        if compiled is None:
            return x_RD + scale_D * update_RD
        out_RD: Tensor = _AddScaled.apply(x_RD, scale_D, update_RD, compiled)
        return out_RD
    if compiled is None:
        return update_RD.mul_(scale_D).add_(x_RD)
    return compiled.add_scaled(x_RD, scale_D, update_RD, update_RD)


def gate_norm(gate_RF: Tensor, up_RF: Tensor, part: RMSNorm) -> Tensor:
    """``part(silu(gate) * up)``, [R, F]; without a graph in the gate's own memory."""
    compiled = _compiled(gate_RF, up_RF, part.weight)
    if compiled is None:
        plain_RF: Tensor = part(F.silu(gate_RF, inplace=not torch.is_grad_enabled()) * up_RF)
        return plain_RF
    if not torch.is_grad_enabled():
        return compiled.gate_norm(gate_RF, up_RF, part.weight, part.eps, gate_RF)
    out_RF: Tensor = _GateNorm.apply(gate_RF, up_RF, part.weight, part.eps, compiled)
    return out_RF


def attend(qkv_R3D: Tensor, query_norm: RMSNorm, key_norm: RMSNorm, heads: int, packed: PackedGrids) -> Tensor:
    """Full attention inside each window: queries and keys turned, then normed over all heads jointly, then softmax.

    Args:
        qkv_R3D: [R, 3D] queries, keys and values of every row, rows in the packing's order.
        query_norm: Its ``eps`` holds for both.
        key_norm: The keys' gain.
        heads: h.
        packed: Windows and angles.
    Returns:
        [R, D].
    """
    compiled = _compiled(qkv_R3D, query_norm.weight, key_norm.weight)
    if compiled is None or qkv_R3D.shape[1] // 3 // heads % compiled.lanes:
        return _attend_plain(qkv_R3D, query_norm, key_norm, heads, packed)
    gains = query_norm.weight, key_norm.weight
    if torch.is_grad_enabled():
        out_RD: Tensor = _Attend.apply(qkv_R3D, *gains, query_norm.eps, heads, packed, compiled)
        return out_RD
    query_RD, key_RD = _turned(compiled, qkv_R3D, *gains, query_norm.eps, heads, packed)
    return _windows(compiled, qkv_R3D, query_RD, key_RD, heads, packed)[0]


def _attend_plain(qkv_R3D: Tensor, query_norm: RMSNorm, key_norm: RMSNorm, heads: int, packed: PackedGrids) -> Tensor:
    rows, size = qkv_R3D.shape[0], qkv_R3D.shape[1] // 3
    query_key, value_RD = qkv_R3D.split([2 * size, size], dim=-1)
    turned = rotate(query_key.view(rows, 2 * heads, size // heads), packed.cos_R1e, packed.sin_R1e)
    query_RD, key_RD = turned.view(rows, 2 * size).split(size, dim=-1)
    query_RD, key_RD = query_norm(query_RD), key_norm(key_RD)
    mixed, start = [], 0
    for count, length in packed.windows:
        run = slice(start, start + count * length)
        query, key, value = (_by_head(x[run], count, heads) for x in (query_RD, key_RD, value_RD))
        out = F.scaled_dot_product_attention(query, key, value)
        mixed.append(out.transpose(1, 2).reshape(count * length, size))
        start += count * length
    if not mixed:
        mixed.append(value_RD)
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _compiled(x: Tensor, *others: Tensor) -> Passes | None:
    found = passes()
    if found is None or not x.is_cpu or x.shape[-1] % found.lanes:
        return None
    if any(value.dtype != torch.float32 or not value.is_contiguous() for value in (x, *others)):
        return None
    return found


def _by_head(x_RD: Tensor, count: int, heads: int) -> Tensor:
    """Rows of equal windows as [windows, h, L, d]; a view."""
    return x_RD.unflatten(0, (count, -1)).unflatten(-1, (heads, -1)).transpose(1, 2)


def _turned(
    compiled: Passes, qkv_R3D: Tensor, query_gain: Tensor, key_gain: Tensor, eps: float, heads: int, packed: PackedGrids
) -> tuple[Tensor, Tensor]:
    """Queries and keys [R, D], turned and normed; the queries times the scale of the scores."""
    size = len(key_gain)
    query, key, _ = qkv_R3D.split(size, dim=-1)
    scaled_gain = query_gain * (size // heads) ** -0.5
    return (
        compiled.turn_norm(query, packed.cos_R1e, packed.sin_R1e, scaled_gain, eps),
        compiled.turn_norm(key, packed.cos_R1e, packed.sin_R1e, key_gain, eps),
    )


def _windows(
    compiled: Passes, qkv_R3D: Tensor, query_RD: Tensor, key_RD: Tensor, heads: int, packed: PackedGrids
) -> tuple[Tensor, list[Tensor]]:
    """Mixed values [R, D], and the logarithms of the softmax's sums of every run of windows."""
    value_RD = qkv_R3D[:, 2 * query_RD.shape[1] :]
    out_RD = torch.empty_like(query_RD)
    sums, start = [], 0
    for count, length in packed.windows:
        run = slice(start, start + count * length)
        parts = (x[run] for x in (query_RD, key_RD, value_RD, out_RD))
        sums.append(compiled.attend(heads, length, *parts))
        start += count * length
    return out_RD, sums


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD: Tensor, gain_D: Tensor, eps: float, compiled: Passes) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x_RD, gain_D)
        ctx.eps = eps
        return compiled.norm(x_RD, gain_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor):  # type: ignore[no-untyped-def, override]
        x_RD, gain_D = ctx.saved_tensors
        return *rms_backward(grad_RD, x_RD, gain_D, rms_scale(x_RD, ctx.eps)), None, None


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD: Tensor, scale_D: Tensor, update_RD: Tensor, compiled: Passes) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(scale_D, update_RD)
        return compiled.add_scaled(x_RD, scale_D, update_RD, torch.empty_like(x_RD))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor):  # type: ignore[no-untyped-def, override]
        scale_D, update_RD = ctx.saved_tensors
        return grad_RD, (grad_RD * update_RD).sum(dim=0), grad_RD * scale_D, None


class _GateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_RF: Tensor, up_RF: Tensor, gain_F: Tensor, eps: float, compiled: Passes) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(gate_RF, up_RF, gain_F)
        ctx.eps = eps
        return compiled.gate_norm(gate_RF, up_RF, gain_F, eps, torch.empty_like(gate_RF))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RF: Tensor):  # type: ignore[no-untyped-def, override]
        gate_RF, up_RF, gain_F = ctx.saved_tensors
        activated_RF = F.silu(gate_RF)
        gated_RF = activated_RF * up_RF
        grad_gated, grad_gain = rms_backward(grad_RF, gated_RF, gain_F, rms_scale(gated_RF, ctx.eps))
        grad_gate = torch.ops.aten.silu_backward(grad_gated * up_RF, gate_RF)
        return grad_gate, activated_RF.mul_(grad_gated), grad_gain, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        qkv_R3D: Tensor,
        query_gain: Tensor,
        key_gain: Tensor,
        eps: float,
        heads: int,
        packed: PackedGrids,
        compiled: Passes,
    ) -> Tensor:
        query_RD, key_RD = _turned(compiled, qkv_R3D, query_gain, key_gain, eps, heads, packed)
        out_RD, sums = _windows(compiled, qkv_R3D, query_RD, key_RD, heads, packed)
        ctx.save_for_backward(qkv_R3D, query_gain, key_gain, out_RD, *sums)
        ctx.rest = eps, heads, packed, compiled
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor):  # type: ignore[no-untyped-def, override]
        qkv_R3D, query_gain, key_gain, out_RD, *sums = ctx.saved_tensors
        eps, heads, packed, compiled = ctx.rest
        query_RD, key_RD = _turned(compiled, qkv_R3D, query_gain, key_gain, eps, heads, packed)
        size = len(key_gain)
        parts = (grad_RD, query_RD, key_RD, qkv_R3D[:, 2 * size :], out_RD)
        grads_R3D = torch.empty_like(qkv_R3D)
        start = 0
        for (count, length), log_sum_NhL in zip(packed.windows, sums, strict=True):
            run = slice(start, start + count * length)
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_by_head(x[run], count, heads) for x in parts), log_sum_NhL, 0.0, False, scale=1.0
            )
            for into, grad in zip(grads_R3D[run].split(size, dim=-1), made, strict=True):
                _by_head(into, count, heads).copy_(grad)
            start += count * length
        grad_gains = []
        for part, gain, scale in ((0, query_gain, (size // heads) ** -0.5), (1, key_gain, 1.0)):
            columns = slice(part * size, (part + 1) * size)
            turned = rotate(qkv_R3D[:, columns].unflatten(-1, (heads, -1)), packed.cos_R1e, packed.sin_R1e).flatten(1)
            grad, grad_gain = rms_backward(grads_R3D[:, columns], turned, gain, rms_scale(turned, eps), scale)
            back = rotate(grad.unflatten(-1, (heads, -1)), packed.cos_R1e, -packed.sin_R1e)
            grads_R3D[:, columns] = back.flatten(1)
            grad_gains.append(grad_gain)
        return grads_R3D, *grad_gains, None, None, None, None
