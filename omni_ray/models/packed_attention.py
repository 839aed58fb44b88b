"""Causal attention over packed sequences, laid out as a few rectangles; hand-written backward, no scatter.

Forward and backward are gathers and batched matrix products only, so the same inputs give the same bits, and a
sequence's arithmetic depends on its own length alone, never on its neighbours'.
"""

# T packed tokens, h heads, S sequences of one rectangle, L their padded length, B = S*h
# d query/key head dim = n (nope) + R (rotary), e value head dim, P = R/2 rotary pairs, G padded rows of all rectangles

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_ray.models.rope import Turn

LENGTH_TILE = 16
"""Sequences are padded to a multiple of this."""
QUERY_BLOCK = 128
"""Queries of one step over a long sequence; each block sees the causal prefix of the keys only."""
RECOMPUTE_ABOVE = 512
"""Above this length the backward makes the probabilities again instead of keeping h * L^2 / 2 of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Sequences of one padded length, a slice of the padded rows."""

    count: int
    """S, sequences."""
    length: int
    """L, rows of each after padding."""
    base: int
    """First padded row; the first padded (head, row) is ``base * heads``."""
    padded: Tensor | None
    """Padded places among the S*h*L query rows; None when every length is exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """How packed rows map to rectangles and back, and the rotary turn of every padded row; made once per forward."""

    heads: int
    """h."""
    rectangles: tuple[Rectangle, ...]
    """In ascending length, none empty; sequences keep their order inside one."""
    rows_G: Tensor
    """Packed row of every padded row; a padded place repeats its sequence's last row."""
    head_rows: Tensor
    """[G*h] the same in a [T*h, dim] view; inside a rectangle in (sequence, head, place) order."""
    restore_T: Tensor
    """Padded row of every packed row."""
    restore_heads: Tensor
    """[T*h] padded (head, row) of every packed (row, head)."""
    turn: Turn
    """Of padded rows."""
    turn_heads: Turn
    """Of padded (head, row)."""


def packed_layout(cu_seqlens: Sequence[int], heads: int, turn: Turn) -> PackedLayout:
    """Group sequences by padded length.

    Args:
        cu_seqlens: 0, then running sums of the lengths; an empty sequence is fine.
        heads: h.
        turn: Of every packed row; its device is the layout's.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(cu_seqlens):
        if end > start:
            by_length.setdefault(end - start + (start - end) % LENGTH_TILE, []).append((start, end - start))
    total, device = cu_seqlens[-1], turn.cos_RP.device
    restore_T, restore_Th = torch.empty(total, dtype=torch.int64), torch.empty(total, heads, dtype=torch.int64)
    head_h = torch.arange(heads)
    rectangles, rows, head_rows = [], [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    base = 0
    for length in sorted(by_length):
        starts_S1, lengths_S1 = torch.tensor(by_length[length]).split(1, dim=1)
        count = len(starts_S1)
        place_L = torch.arange(length)
        real_SL = place_L < lengths_S1
        rows_SL = starts_S1 + torch.minimum(place_L, lengths_S1 - 1)
        first_S1 = base + torch.arange(count)[:, None] * length
        real_rows = rows_SL[real_SL]
        restore_T[real_rows] = (first_S1 + place_L)[real_SL]
        restore_Th[real_rows] = ((first_S1 * heads + place_L)[:, :, None] + head_h * length)[real_SL]
        rows.append(rows_SL.flatten())
        head_rows.append((rows_SL[:, None, :] * heads + head_h[:, None]).flatten())
        outside = (~real_SL)[:, None, :].expand(count, heads, length).flatten().nonzero().flatten().to(device)
        padded = outside if outside.numel() else None
        rectangles.append(Rectangle(count=count, length=length, base=base, padded=padded))
        base += count * length
    rows_G, head_rows_G = torch.cat(rows).to(device), torch.cat(head_rows).to(device)
    return PackedLayout(
        heads=heads,
        rectangles=tuple(rectangles),
        rows_G=rows_G,
        head_rows=head_rows_G,
        restore_T=restore_T.to(device),
        restore_heads=restore_Th.flatten().to(device),
        turn=turn.select(rows_G),
        turn_heads=turn.select(head_rows_G // heads),
    )


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, QUERY_BLOCK):
        yield start, min(start + QUERY_BLOCK, length)


class _Heads:
    """One rectangle's gathered queries, keys and values as the views that the products need; B = S*h."""

    def __init__(self, r: Rectangle, layout: PackedLayout, q: Tensor, kv: Tensor, k_rope: Tensor, nope: int) -> None:
        self.rectangle, self.nope = r, nope
        self.rows = slice(r.base * layout.heads, (r.base + r.count * r.length) * layout.heads)
        self.key_rows = slice(r.base, r.base + r.count * r.length)
        self.q_BLd = q[self.rows].view(-1, r.length, q.shape[1])
        self.kv_BLne = kv[self.rows].view(-1, r.length, kv.shape[1])
        self.k_rope_SLR = k_rope[self.key_rows].view(r.count, r.length, -1)

    def shared(self, x_BXY: Tensor) -> Tensor:
        """[S*h, X, Y] as [S, h*X, Y]: the rotary key is one for all heads of a sequence."""
        return x_BXY.reshape(self.rectangle.count, -1, x_BXY.shape[-1])

    def probabilities(self, start: int, end: int) -> Tensor:
        """Softmax rows of queries [start, end) over keys [0, end): [B, end-start, end]; padded queries give zeros."""
        q_BXd, k_BYn = self.q_BLd[:, start:end], self.kv_BLne[:, :end, : self.nope]
        hidden_XY = q_BXd.new_full((end - start, end), float("-inf")).triu_(start + 1)
        scores = torch.baddbmm(hidden_XY, q_BXd[..., : self.nope], k_BYn.transpose(1, 2))
        keys_SRY = self.k_rope_SLR[:, :end].transpose(1, 2)
        self.shared(scores).baddbmm_(self.shared(q_BXd[..., self.nope :]), keys_SRY)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = scores.softmax(dim=-1, dtype=wide).to(scores.dtype)
        padded = self.rectangle.padded
        if padded is not None and end - start == self.rectangle.length:
            out.view(-1, end).index_fill_(0, padded, 0.0)
        elif padded is not None:
            place = padded % self.rectangle.length
            inside = (place >= start) & (place < end)
            rows = (padded // self.rectangle.length * (end - start) + place - start)[inside]
            out.view(-1, end).index_fill_(0, rows, 0.0)
        return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor, nope: int, layout: PackedLayout) -> Tensor:  # type: ignore[no-untyped-def, override]
        q = q_Thd.flatten(0, 1).index_select(0, layout.head_rows)
        layout.turn_heads.apply_(q[:, nope:])
        kv = kv_Thne.flatten(0, 1).index_select(0, layout.head_rows)
        k_rope = k_rope_TR.index_select(0, layout.rows_G)
        layout.turn.apply_(k_rope)
        out = q.new_empty(q.shape[0], kv.shape[1] - nope)
        kept: list[Tensor] = []
        for r in layout.rectangles:
            group = _Heads(r, layout, q, kv, k_rope, nope)
            out_BLe = out[group.rows].view(-1, r.length, out.shape[1])
            for start, end in _blocks(r.length):
                probs = group.probabilities(start, end)
                torch.bmm(probs, group.kv_BLne[:, :end, nope:], out=out_BLe[:, start:end])
                if r.length <= RECOMPUTE_ABOVE:
                    kept.append(probs)
        ctx.save_for_backward(q, kv, k_rope, *kept)
        ctx.layout, ctx.nope = layout, nope
        return out.index_select(0, layout.restore_heads).view(*q_Thd.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_The: Tensor):  # type: ignore[no-untyped-def, override]
        layout, nope = ctx.layout, ctx.nope
        q, kv, k_rope, *kept = ctx.saved_tensors
        grad = grad_The.flatten(0, 1).index_select(0, layout.head_rows)
        dq, dkv, dk_rope = torch.empty_like(q), torch.empty_like(kv), torch.empty_like(k_rope)
        probs = iter(kept)
        for r in layout.rectangles:
            group = _Heads(r, layout, q, kv, k_rope, nope)
            into = _Heads(r, layout, dq, dkv, dk_rope, nope)
            of_rectangle = [next(probs) for _ in _blocks(r.length)] if r.length <= RECOMPUTE_ABOVE else None
            _rectangle_backward(group, into, grad[group.rows].view(-1, r.length, grad.shape[1]), of_rectangle)
        layout.turn_heads.apply_(dq[:, nope:], back=True)
        layout.turn.apply_(dk_rope, back=True)
        return (
            dq.index_select(0, layout.restore_heads).view(*grad_The.shape[:2], -1),
            dkv.index_select(0, layout.restore_heads).view(*grad_The.shape[:2], -1),
            dk_rope.index_select(0, layout.restore_T),
            None,
            None,
        )


def _rectangle_backward(group: _Heads, into: _Heads, grad_BLe: Tensor, kept: list[Tensor] | None) -> None:
    """Write the gradients of one rectangle's gathered q, kv and k_rope into the views of ``into``."""
    nope, length = group.nope, group.rectangle.length
    values_BLe = group.kv_BLne[..., nope:]
    # The last block comes first: it sees every key, so it writes the key gradients and the others add to them.
    for index, (start, end) in reversed(list(enumerate(_blocks(length)))):
        probs = kept[index] if kept is not None else group.probabilities(start, end)
        grad = grad_BLe[:, start:end]
        dprobs = torch.bmm(grad, values_BLe[:, :end].transpose(1, 2))
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        shared = group.shared(dscores)
        torch.bmm(dscores, group.kv_BLne[:, :end, :nope], out=into.q_BLd[:, start:end, :nope])
        dq_rope = torch.bmm(shared, group.k_rope_SLR[:, :end])
        into.q_BLd[:, start:end, nope:] = dq_rope.view(-1, end - start, dq_rope.shape[-1])
        parts = (
            (into.kv_BLne[:, :end, :nope], dscores, group.q_BLd[:, start:end, :nope]),
            (into.kv_BLne[:, :end, nope:], probs, grad),
            (into.k_rope_SLR[:, :end], shared, group.shared(group.q_BLd[:, start:end, nope:])),
        )
        for target, left, right in parts:
            product = torch.bmm(left.transpose(1, 2), right)
            if end == length:
                target.copy_(product)
            else:
                target.add_(product)


def packed_attention(q_Thd: Tensor, kv_Thne: Tensor, k_rope_TR: Tensor, nope: int, layout: PackedLayout) -> Tensor:
    """Causal softmax attention inside each packed sequence, rotary turn included.

    Args:
        q_Thd: [T, h, nope + R] already times the score scale, not yet turned.
        kv_Thne: [T, h, nope + e]: keys without rotary part, then values.
        k_rope_TR: [T, R] rotary key shared by all heads, not yet turned.
        nope: n.
        layout: Of this packing.
    Returns:
        [T, h, e].
    Source: models.md section 4, MLA: softmax((q_n k_n + q_r k_r) / sqrt(dn + dr)) v.
    """
    out: Tensor = _PackedAttention.apply(q_Thd, kv_Thne, k_rope_TR, nope, layout)
    return out
