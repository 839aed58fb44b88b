"""Calls into ``attention.c``: causal attention over packed sequences, shared out over torch's threads."""

# T packed rows, h heads, d = n (nope) + R (rotary) query and key dim, e value dim, P rotary pairs

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_ray.models.native.library import form_of, library_with, own_products_are_faster
from omni_ray.models.native.threads import Scratch, share_out


class Operands(NamedTuple):
    """What attention reads."""

    q_Thd: Tensor
    """Already times the score scale, not yet turned."""
    kv_Thne: Tensor
    """Keys without rotary part, then values."""
    k_rope_TR: Tensor
    """Rotary key shared by all heads, not yet turned; rows may lie apart."""
    cos_TP: Tensor
    """fp32."""
    sin_TP: Tensor
    """fp32."""


class Attention:
    """The compiled functions over one dtype on the CPU; a sequence's bits feel neither threads nor neighbours."""

    def __init__(self, compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._forward, self._back, self._room, self._back_room = (
            form_of(compiled, name, dtype)
            for name in ("attend", "attend_back", "attend_scratch_bytes", "attend_back_scratch_bytes")
        )
        self._scratch = Scratch()

    def forward(self, operands: Operands, cu_seqlens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[T, h, e], and the logarithm of every softmax's sum, [h, T]."""
        q = operands.q_Thd
        rows, heads = q.shape[:2]
        shape = _Shape.of(operands, cu_seqlens)
        out_The, log_sum_hT = q.new_empty(rows, heads, shape.value), q.new_empty(heads, rows, dtype=torch.float32)
        self._share(self._forward, self._room, shape, operands, out_The, log_sum_hT)
        return out_The, log_sum_hT

    def backward(
        self, operands: Operands, cu_seqlens: Sequence[int], out_The: Tensor, log_sum_hT: Tensor, grad_The: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys with values, and the rotary keys."""
        q, kv, k_rope, *_ = operands
        shape = _Shape.of(operands, cu_seqlens)
        grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
        grad_rope_hTR = q.new_empty(shape.heads, shape.rows, shape.rope, dtype=torch.float32)
        given = (out_The, log_sum_hT, grad_The.contiguous(), grad_q, grad_kv, grad_rope_hTR)
        self._share(self._back, self._back_room, shape, operands, *given)
        return grad_q, grad_kv, grad_rope_hTR.sum(dim=0).to(k_rope.dtype)

    def _share(self, function: Any, room: Any, shape: _Shape, operands: Operands, *given: Tensor) -> None:
        """Every sequence's head is worth a thread."""
        sizes = [c_int64(x) for x in (shape.nope, shape.rope, shape.value)]
        q, kv, k_rope, cos, sin = (c_void_p(x.data_ptr()) for x in operands)
        read = (q, kv, k_rope, c_int64(operands.k_rope_TR.stride(0)), cos, sin)
        made = [c_void_p(x.data_ptr()) for x in given]
        ends = torch.tensor(shape.cu_seqlens, dtype=torch.int32, device="cpu")
        bytes_ = int(room(c_int64(shape.longest), *sizes))

        def share(first: int, end: int) -> None:
            items = (c_int64(first), c_int64(end), c_void_p(ends.data_ptr()), c_int64(shape.rows), c_int64(shape.heads))
            function(*items, *sizes, *read, *made, c_void_p(self._scratch(bytes_)))

        share_out((len(ends) - 1) * shape.heads, 1, share)


class _Shape(NamedTuple):
    rows: int
    heads: int
    nope: int
    rope: int
    value: int
    longest: int
    cu_seqlens: Sequence[int]

    @classmethod
    def of(cls, operands: Operands, cu_seqlens: Sequence[int]) -> _Shape:
        """Compiled code trusts its sizes.

        Raises:
            RuntimeError: shapes that do not belong together.
        """
        q, kv, k_rope, cos, sin = operands
        (rows, heads, dim), rope = q.shape, k_rope.shape[1]
        nope, value = dim - rope, kv.shape[2] - (dim - rope)
        fits = kv.shape[:2] == (rows, heads) and len(k_rope) == rows and cos.shape == sin.shape == (rows, rope // 2)
        whole = all(x.is_contiguous() for x in (q, kv, cos, sin)) and (rope < 2 or k_rope.stride(1) == 1)
        fits = fits and kv.dtype == k_rope.dtype == q.dtype and cos.dtype == sin.dtype == torch.float32
        ends = list(cu_seqlens)
        packed = ends[:1] == [0] and ends == sorted(ends) and ends[-1] == rows
        if not (fits and whole and packed and rope % 2 == 0 and min(nope, value) >= 0):
            shapes = ", ".join(str(list(x.shape)) for x in operands)
            raise RuntimeError(f"attention cannot take {shapes} over sequences {ends}")
        longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
        return cls(rows, heads, nope, rope, value, longest, ends)


@functools.cache
def attention(dtype: torch.dtype) -> Attention | None:
    """The compiled functions; None where there is no compiler, they are switched off or the dtype has none.

    In bf16, where nearly all is products, a processor that multiplies whole tiles serves torch's form better.
    """
    fast = dtype != torch.bfloat16 or own_products_are_faster()
    compiled = library_with("attend", dtype) if fast else None
    return None if compiled is None else Attention(compiled, dtype)
