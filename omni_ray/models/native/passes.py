"""Calls into ``vision.c``: passes over rows, and attention inside windows; rows are shared out over torch's threads."""

# R rows, D hidden size, h heads, d head size, e angles, L rows of a window, N windows

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from omni_ray.models.native.library import library
from omni_ray.models.native.threads import LEAST_ROWS, Scratch, share_out


class Passes:
    """The compiled functions over contiguous fp32 tensors on the CPU; a row's bits do not depend on the threads."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._library = compiled
        self.lanes = int(compiled.lanes())
        self._scratch = Scratch()

    def norm(self, x_RD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * gain``."""
        out_RD = torch.empty_like(x_RD)
        self._rows(self._library.norm_rows, x_RD, x_RD, gain_D, eps, out_RD)
        return out_RD

    def add_scaled(self, x_RD: Tensor, scale_D: Tensor, update_RD: Tensor, out_RD: Tensor) -> Tensor:
        """``x + scale * update`` into ``out``, which may be ``update``."""
        self._rows(self._library.add_scaled_rows, x_RD, x_RD, scale_D, update_RD, out_RD)
        return out_RD

    def gate_norm(self, gate_RF: Tensor, up_RF: Tensor, gain_F: Tensor, eps: float, out_RF: Tensor) -> Tensor:
        """``y / rms(y) * gain`` of ``y = silu(gate) * up`` into ``out``, which may be ``gate``."""
        self._rows(self._library.gate_norm_rows, gate_RF, gate_RF, up_RF, gain_F, eps, out_RF)
        return out_RF

    def turn_norm(self, x_RD: Tensor, cos_R1e: Tensor, sin_R1e: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        """``y / rms(y) * gain`` of every head's pairs turned; rows of ``x`` may lie apart."""
        rows, size = x_RD.shape
        head = 2 * cos_R1e.shape[-1]
        out_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        sizes = (c_int64(size // head), c_int64(head), _at(x_RD), c_int64(x_RD.stride(0)))
        rest = (_at(cos_R1e), _at(sin_R1e), _at(gain_D), c_float(eps), _at(out_RD))
        share_out(rows, LEAST_ROWS, lambda a, b: self._library.turn_norm_rows(c_int64(a), c_int64(b), *sizes, *rest))
        return out_RD

    def attend(
        self, heads: int, length: int, query_RD: Tensor, key_RD: Tensor, value_RD: Tensor, out_RD: Tensor
    ) -> Tensor:
        """Softmax attention inside windows of one length, queries already scaled, into ``out``.

        Returns:
            Logarithms of the softmax's sums, [N, h, L].
        """
        rows, size = query_RD.shape
        head, windows = size // heads, rows // length
        log_sum_NhL = query_RD.new_empty(windows, heads, length)
        room = int(self._library.window_scratch_floats(c_int64(length), c_int64(head)))
        sizes = (c_int64(length), c_int64(heads), c_int64(head))
        read = (_at(query_RD), _at(key_RD), _at(value_RD), c_int64(value_RD.stride(0)))

        def share(first: int, end: int) -> None:
            made = (_at(out_RD), _at(log_sum_NhL), c_void_p(self._scratch(room * out_RD.element_size())))
            self._library.window_attend(c_int64(first), c_int64(end), *sizes, *read, *made)

        share_out(windows * heads, max(1, LEAST_ROWS // length), share)
        return log_sum_NhL

    def _rows(self, function: Callable[..., None], like_RD: Tensor, *arguments: Tensor | float) -> None:
        rows, size = like_RD.shape
        rest = [c_float(value) if isinstance(value, float) else _at(value) for value in arguments]
        share_out(rows, LEAST_ROWS, lambda a, b: function(c_int64(a), c_int64(b), c_int64(size), *rest))


@functools.cache
def passes() -> Passes | None:
    """The compiled functions; None where there is no compiler or they are switched off."""
    compiled = library()
    return None if compiled is None else Passes(compiled)


def _at(values: Tensor) -> c_void_p:
    return c_void_p(values.data_ptr())
