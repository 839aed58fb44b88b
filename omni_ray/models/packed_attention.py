"""Causal attention over packed sequences, laid out as a few rectangles; hand-written backward, no scatter-add.

Forward and backward are copies and batched matrix products only, so the same inputs give the same bits, and a
sequence's arithmetic depends on its own length alone, never on its neighbours'.
"""

# T packed tokens, h heads, S sequences of one rectangle, L their padded length, B = S*h
# d query/key head dim = n (nope) + R (rotary), e value head dim, X queries of one block, Y keys that they see

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_ray.models.native.attention import Attention, Operands, attention
from omni_ray.models.native.library import compiled_takes
from omni_ray.models.recompute import rebuilding
from omni_ray.models.rope import Turn

LENGTH_TILE = 16
"""Sequences are padded to a multiple of this."""
QUERY_BLOCK = 128
"""Queries of one step over a long sequence; each block sees the causal prefix of the keys only."""
RECOMPUTE_ABOVE = 1024
"""Above this length the backward makes the probabilities again instead of keeping h * L^2 / 2 of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Sequences of one padded length, and where their rows lie among the packed ones."""

    count: int
    """S, sequences."""
    length: int
    """L, rows of each after padding."""
    start: int
    """First packed row, where the sequences lie one after the other without padding; else unused."""
    rows: Tensor | None
    """[S*L] packed row of every place, a padded place repeating its sequence's last row; None for a plain slice."""
    real: Tensor | None
    """Places that are no padding; None when none is."""
    padded: Tensor | None
    """Places that are padding; None when none is."""
    turn: Turn
    """Rotary turn of every place."""

    def take(self, x_TX: Tensor) -> Tensor:
        """[T, ...] packed rows -> [S, L, ...]; a view where it can be one."""
        shape = (self.count, self.length, *x_TX.shape[1:])
        if self.rows is None:
            return x_TX[self.start : self.start + self.count * self.length].view(shape)
        return x_TX.index_select(0, self.rows).view(shape)

    def room(self, x_TX: Tensor) -> Tensor:
        """[S, L, ...] to be filled and then given to :meth:`put`: the rows of ``x_TX`` themselves where they can be."""
        if self.rows is None:
            return self.take(x_TX)
        return x_TX.new_empty((self.count, self.length, *x_TX.shape[1:]))

    def put(self, x_TX: Tensor, room_SLX: Tensor) -> None:
        """Write what :meth:`room` was filled with to its packed rows, padding left out."""
        if self.rows is None:
            return
        places = room_SLX.flatten(0, 1)
        if self.real is None:
            x_TX.index_copy_(0, self.rows, places)
        else:
            x_TX.index_copy_(0, self.rows.index_select(0, self.real), places.index_select(0, self.real))


class PackedLayout:
    """How packed rows lie; made once per forward."""

    def __init__(self, cu_seqlens: Sequence[int], heads: int, turn: Turn) -> None:
        self.cu_seqlens, self.heads, self.turn = tuple(cu_seqlens), heads, turn

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """Sequences by padded length, ascending, none empty; they keep their order inside one."""
        by_length: dict[int, list[tuple[int, int]]] = {}
        for start, end in itertools.pairwise(self.cu_seqlens):
            if end > start:
                by_length.setdefault(end - start + (start - end) % LENGTH_TILE, []).append((start, end - start))
        return tuple(_rectangle(length, by_length[length], self.turn) for length in sorted(by_length))


def packed_layout(cu_seqlens: Sequence[int], heads: int, turn: Turn) -> PackedLayout:
    """The layout of one packing.

    Args:
        cu_seqlens: 0, then running sums of the lengths; an empty sequence is fine.
        heads: h.
        turn: Of every packed row; its device is the layout's.
    """
    return PackedLayout(cu_seqlens, heads, turn)


def _rectangle(length: int, members: list[tuple[int, int]], turn: Turn) -> Rectangle:
    device, count, first = turn.cos_RP.device, len(members), members[0][0]
    if members == [(first + number * length, length) for number in range(count)]:
        there = turn.part(slice(first, first + count * length))
        return Rectangle(count=count, length=length, start=first, rows=None, real=None, padded=None, turn=there)
    starts_S1, lengths_S1 = torch.tensor(members).split(1, dim=1)
    place_L = torch.arange(length)
    rows = (starts_S1 + torch.minimum(place_L, lengths_S1 - 1)).flatten().to(device)
    is_real = (place_L < lengths_S1).flatten()
    real = padded = None
    if not bool(is_real.all()):
        real, padded = (mask.nonzero().flatten().to(device) for mask in (is_real, ~is_real))
    there = turn.select(rows)
    return Rectangle(count=count, length=length, start=0, rows=rows, real=real, padded=padded, turn=there)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, QUERY_BLOCK):
        yield start, min(start + QUERY_BLOCK, length)


def _by_head(r: Rectangle, q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor, nope: int) -> tuple[Tensor, ...]:
    """One rectangle's turned queries and keys and its values, each contiguous: [B, L, d], [B, L, d], [B, L, e]."""
    q_SLhd, kv_SLhx, rope_SLR = r.take(q_Thd), r.take(kv_Thne), r.take(k_rope_TR)
    heads, dim = q_SLhd.shape[2:]
    q = q_SLhd.new_empty(r.count, heads, r.length, dim)
    q[..., :nope] = q_SLhd[..., :nope].transpose(1, 2)
    r.turn.turn_into(q[..., nope:].transpose(1, 2), q_SLhd[..., nope:])
    turned_SLR = torch.empty_like(rope_SLR, memory_format=torch.contiguous_format)
    r.turn.turn_into(turned_SLR.unsqueeze(2), rope_SLR.unsqueeze(2))
    k = torch.empty_like(q)
    k[..., :nope] = kv_SLhx[..., :nope].transpose(1, 2)
    k[..., nope:] = turned_SLR.unsqueeze(1)
    v = kv_SLhx[..., nope:].transpose(1, 2).contiguous()
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def _probabilities(q_BLd: Tensor, k_BLd: Tensor, start: int, end: int) -> Tensor:
    """Softmax rows of queries [start, end) over keys [0, end): [B, X, Y]; the sums of a row in fp32 at least."""
    scores = torch.bmm(q_BLd[:, start:end], k_BLd[:, :end].transpose(1, 2))
    future = scores.new_full((end - start, end - start), float("-inf")).triu_(1)
    scores[:, :, start:end].add_(future)
    return scores.softmax(dim=-1)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor, nope: int, layout: PackedLayout) -> Tensor:  # type: ignore[no-untyped-def, override]
        out_The = q_Thd.new_empty(*q_Thd.shape[:2], kv_Thne.shape[2] - nope)
        kept: list[Tensor] = []
        ctx.rebuilds = rebuilding()
        for r in layout.rectangles:
            q, k, v = _by_head(r, q_Thd, kv_Thne, k_rope_TR, nope)
            out_BLe = torch.empty_like(v)
            keep = r.length <= RECOMPUTE_ABOVE and not ctx.rebuilds
            kept += [q, k, v]
            for start, end in _blocks(r.length):
                probs = _probabilities(q, k, start, end)
                out_BLe[:, start:end] = torch.bmm(probs, v[:, :end])
                if keep:
                    kept.append(probs)
            room = r.room(out_The)
            room.copy_(out_BLe.unflatten(0, (r.count, -1)).transpose(1, 2))
            r.put(out_The, room)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.nope, ctx.shapes = layout, nope, (q_Thd.shape, kv_Thne.shape, k_rope_TR.shape)
        return out_The

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_The: Tensor):  # type: ignore[no-untyped-def, override]
        grads = tuple(grad_The.new_empty(shape) for shape in ctx.shapes)
        kept = iter(ctx.saved_tensors)
        for r in ctx.layout.rectangles:
            q, k, v = (next(kept) for _ in range(3))
            keep = r.length <= RECOMPUTE_ABOVE and not ctx.rebuilds
            probs = [next(kept) for _ in _blocks(r.length)] if keep else None
            grad_SLhe = r.take(grad_The)
            if r.padded is not None:
                # Padded queries repeat a real row; with no gradient of their own they give nothing to any key.
                grad_SLhe.flatten(0, 1).index_fill_(0, r.padded, 0.0)
            grad = grad_SLhe.transpose(1, 2).contiguous().flatten(0, 1)
            _spread(r, grads, _rectangle_backward(q, k, v, grad, probs), ctx.nope)
        return *grads, None, None


def _rectangle_backward(
    q: Tensor, k: Tensor, v: Tensor, grad_BLe: Tensor, kept: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_by_head`'s three tensors."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # The last block comes first: it sees every key, so it writes the key gradients and the others add to them.
    for index, (start, end) in reversed(list(enumerate(_blocks(q.shape[1])))):
        probs = kept[index] if kept is not None else _probabilities(q, k, start, end)
        grad = grad_BLe[:, start:end]
        dprobs = torch.bmm(grad, v[:, :end].transpose(1, 2))
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        dq[:, start:end] = torch.bmm(dscores, k[:, :end])
        scale = 0 if end == q.shape[1] else 1
        dk[:, :end].baddbmm_(dscores.transpose(1, 2), q[:, start:end], beta=scale)
        dv[:, :end].baddbmm_(probs.transpose(1, 2), grad, beta=scale)
    return dq, dk, dv


def _spread(r: Rectangle, into: tuple[Tensor, ...], of_heads: tuple[Tensor, Tensor, Tensor], nope: int) -> None:
    """The adjoint of :func:`_by_head`: write one rectangle's gradients to the packed rows of q, kv and k_rope."""
    dq, dk, dv = (x.unflatten(0, (r.count, -1)).transpose(1, 2) for x in of_heads)
    room_q, room_kv, room_rope = (r.room(x) for x in into)
    room_q[..., :nope] = dq[..., :nope]
    r.turn.turn_into(room_q[..., nope:], dq[..., nope:], back=True)
    room_kv[..., :nope] = dk[..., :nope]
    room_kv[..., nope:] = dv
    r.turn.turn_into(room_rope.unsqueeze(2), dk[..., nope:].sum(dim=2, keepdim=True), back=True)
    for x, room in zip(into, (room_q, room_kv, room_rope), strict=True):
        r.put(x, room)


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, compiled: Attention, layout: PackedLayout, q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor
    ) -> Tensor:
        operands = Operands(q_Thd, kv_Thne, k_rope_TR, layout.turn.cos_RP, layout.turn.sin_RP)
        out_The, log_sum_hT = compiled.forward(operands, layout.cu_seqlens)
        ctx.compiled, ctx.cu_seqlens = compiled, layout.cu_seqlens
        ctx.save_for_backward(*operands, out_The, log_sum_hT)
        return out_The

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_The: Tensor):  # type: ignore[no-untyped-def, override]
        *operands, out_The, log_sum_hT = ctx.saved_tensors
        given = (Operands(*operands), ctx.cu_seqlens, out_The, log_sum_hT, grad_The)
        return None, None, *ctx.compiled.backward(*given)


def fused_attention(q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor, nope: int, layout: PackedLayout) -> Tensor:
    """:func:`packed_attention` through torch's fused kernels (flash, cuDNN or memory-efficient, whichever fits).

    A rectangle needs no mask but the causal one: padded keys stand after every real query.  In deterministic mode
    (``torch.use_deterministic_algorithms``) the kernels' backwards are the deterministic ones.
    """
    out_The = q_Thd.new_zeros(*q_Thd.shape[:2], kv_Thne.shape[2] - nope)
    for r in layout.rectangles:
        q, kv, rope = (r.take(x) for x in (q_Thd, kv_Thne, k_rope_TR))
        rope_SLhR = r.turn.turned(rope.unsqueeze(2)).expand(-1, -1, layout.heads, -1)
        q = torch.cat([q[..., :nope], r.turn.turned(q[..., nope:])], dim=-1).transpose(1, 2)
        k = torch.cat([kv[..., :nope], rope_SLhR], dim=-1).transpose(1, 2)
        v = kv[..., nope:].transpose(1, 2)
        # The fused kernels want one head size for all three; zeros behind the values are cut off again.
        narrow = max(0, q.shape[-1] - v.shape[-1])
        mixed = F.scaled_dot_product_attention(q, k, F.pad(v, (0, narrow)), is_causal=True, scale=1.0)
        places = mixed[..., : v.shape[-1]].transpose(1, 2).flatten(0, 1)
        rows = r.rows if r.rows is not None else torch.arange(r.start, r.start + len(places), device=places.device)
        if r.real is not None:
            rows, places = rows.index_select(0, r.real), places.index_select(0, r.real)
        out_The = out_The.index_copy(0, rows, places)
    return out_The


def packed_attention(q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor, nope: int, layout: PackedLayout) -> Tensor:
    """Causal softmax attention inside each packed sequence, rotary turn included.

    The one place that chooses a kernel: compiled functions on the CPU, where there are some for the dtype (0038), else
    query blocks of batched products, which beat torch's fused kernel there and keep a sequence's bits its own; torch's
    fused kernels on CUDA.

    Args:
        q_Thd: [T, h, nope + R] already times the score scale, not yet turned.
        kv_Thne: [T, h, nope + e]: keys without rotary part, then values.
        k_rope_TR: [T, R] rotary key shared by all heads, not yet turned.
        nope: n.
        layout: Of this packing.
    Returns:
        [T, h, e].
    Source: networks.md section 4, MLA: softmax((q_n k_n + q_r k_r) / sqrt(dn + dr)) v.
    """
    if q_Thd.is_cuda:
        return fused_attention(q_Thd, kv_Thne, k_rope_TR, nope, layout)
    takes = compiled_takes(q_Thd, kv_Thne, k_rope_TR) and compiled_takes(layout.turn.cos_RP)
    fits = takes and layout.turn.cos_RP.dtype == torch.float32 and k_rope_TR.stride(-1) == 1
    compiled = attention(q_Thd.dtype) if fits else None
    out: Tensor
    if compiled is not None:
        out = _CompiledAttention.apply(compiled, layout, q_Thd.contiguous(), kv_Thne.contiguous(), k_rope_TR)
    else:
        out = _PackedAttention.apply(q_Thd, kv_Thne, k_rope_TR, nope, layout)
    return out
