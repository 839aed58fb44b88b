"""Calls into ``products.c``: products of matrices of any orientation, shared out over torch's threads."""

# R rows, K inputs, N outputs, G groups

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from omni_ray.models.native.library import form_of, library_with, must_fit, own_products_are_faster
from omni_ray.models.native.threads import LEAST_ROWS, Scratch, share_out

LEAST_WORK = 1 << 20
"""Sums of fewer products, about 20 microseconds, are not worth another thread."""


class Products:
    """The compiled functions over matrices of one dtype on the CPU.

    An element's bits feel neither threads nor neighbours. Sums are fp32, whatever the dtype; bf16 is rounded to once.
    """

    def __init__(self, compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._one, self._groups, self._inner = (
            _typed(form_of(compiled, name, dtype), kinds)
            for name, kinds in (
                ("product_rows", "nnnn pnn pnn pn n p"),
                ("product_groups", "nn p nn pnn pnnn pn p"),
                ("product_inner_groups", "nn p nn pnn pnn p p"),
            )
        )
        self._room = int(form_of(compiled, "product_scratch_bytes", dtype)())
        self._kept = Scratch()

    def __call__(self, a_RK: Tensor, b_KN: Tensor, total_RN: Tensor | None = None) -> Tensor:
        """``a @ b``, [R, N]; with ``total``, contiguous and fp32, added to it."""
        a_RK, b_KN = _stepping(a_RK), _stepping(b_KN)
        (rows, inputs), outputs = a_RK.shape, b_KN.shape[1]
        out_RN = a_RK.new_empty(rows, outputs) if total_RN is None else total_RN
        _fit(b_KN.shape[0] == inputs and out_RN.shape == (rows, outputs) and out_RN.is_contiguous(), a_RK, b_KN, out_RN)
        read, right, made = (a_RK.data_ptr(), *a_RK.stride()), b_KN.stride(1), out_RN.data_ptr()
        rest = (outputs, int(total_RN is not None))
        size, out_size = b_KN.element_size(), out_RN.element_size()

        def of_rows(first: int, end: int) -> None:
            operands = (*read, b_KN.data_ptr(), *b_KN.stride(), made, *rest)
            self._one(first, end, outputs, inputs, *operands, self._scratch())

        def of_columns(first: int, end: int) -> None:
            part = (b_KN.data_ptr() + size * first * right, *b_KN.stride(), made + out_size * first)
            self._one(0, rows, end - first, inputs, *read, *part, *rest, self._scratch())

        # Each thread copies the columns that it needs: few of them, where there are few rows to pay for it.
        least = max(LEAST_ROWS, LEAST_WORK // max(1, min(rows, outputs) * inputs))
        share_out(max(rows, outputs), least, of_rows if rows >= outputs else of_columns)
        return out_RN

    def groups(self, a_RK: Tensor, b_GKN: Tensor, ends_G: Tensor) -> Tensor:
        """Each group of rows with its own matrix, [R, N]; ``ends``: int32 on the CPU."""
        a_RK, b_GKN, ends_G = _stepping(a_RK), _stepping(b_GKN), ends_G.contiguous()
        (rows, inputs), outputs = a_RK.shape, b_GKN.shape[2]
        _fit(b_GKN.shape[:2] == (len(ends_G), inputs) and _ends_at(ends_G, rows), a_RK, b_GKN, ends_G)
        out_RN = a_RK.new_empty(rows, outputs)
        operands = (a_RK.data_ptr(), *a_RK.stride(), b_GKN.data_ptr(), *b_GKN.stride(), out_RN.data_ptr(), outputs)
        sizes = (ends_G.data_ptr(), outputs, inputs)
        share_out(len(ends_G), 1, lambda x, y: self._groups(x, y, *sizes, *operands, self._scratch()))
        return out_RN

    def inner_groups(self, a_RK: Tensor, b_KN: Tensor, ends_G: Tensor, out_GRN: Tensor | None = None) -> Tensor:
        """Sums over each group of inputs, [G, R, N], to ``out`` where there is one; ``ends``: int32 on the CPU."""
        a_RK, b_KN, ends_G = _stepping(a_RK), _stepping(b_KN), ends_G.contiguous()
        rows, outputs = a_RK.shape[0], b_KN.shape[1]
        _fit(b_KN.shape[0] == a_RK.shape[1] and _ends_at(ends_G, a_RK.shape[1]), a_RK, b_KN, ends_G)
        out_GRN = a_RK.new_empty(len(ends_G), rows, outputs) if out_GRN is None else out_GRN
        _fit(out_GRN.shape == (len(ends_G), rows, outputs) and out_GRN.is_contiguous(), a_RK, b_KN, out_GRN)
        operands = (a_RK.data_ptr(), *a_RK.stride(), b_KN.data_ptr(), *b_KN.stride(), out_GRN.data_ptr())
        sizes = (ends_G.data_ptr(), rows, outputs)
        share_out(len(ends_G), 1, lambda x, y: self._inner(x, y, *sizes, *operands, self._scratch()))
        return out_GRN

    def _scratch(self) -> int:
        return self._kept(self._room)


@functools.cache
def products(dtype: torch.dtype) -> Products | None:
    """The compiled functions; None where there is no compiler, they are switched off or torch's own are faster."""
    compiled = library_with("product_rows", dtype) if own_products_are_faster() else None
    return None if compiled is None else Products(compiled, dtype)


def _typed(function: Any, kinds: str) -> Any:
    function.restype = None
    function.argtypes = [c_void_p if kind == "p" else c_int64 for kind in kinds.replace(" ", "")]
    return function


def _fit(fits: bool, *operands: Tensor) -> None:
    must_fit(fits, "matrices cannot be multiplied", *operands)


def _ends_at(ends_G: Tensor, rows: int) -> bool:
    ends = [0, *ends_G.tolist()]
    return ends_G.dtype == torch.int32 and ends == sorted(ends) and ends[-1] == rows


def _stepping(matrix: Tensor) -> Tensor:
    """The matrix itself where one of its last two steps is 1, else a copy."""
    return matrix if 1 in matrix.stride()[-2:] and 0 not in matrix.stride() else matrix.contiguous()
