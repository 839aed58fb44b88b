"""Calls into ``layers.c``: norms, gates and the loss between the products, rows shared out over torch's threads."""

# R rows, D size, F inner size, V vocabulary

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from omni_ray.models.native.library import form_of, library_with, must_fit
from omni_ray.models.native.threads import LEAST_ROWS, share_out

GAIN_BLOCK = 64
"""Rows whose gradients of a gain are added up together, so that threads change no sum."""


class LayerPasses:
    """The compiled functions over one dtype on the CPU; a row's bits do not depend on the threads or on other rows."""

    def __init__(self, compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._norm, self._norm_back, self._gate, self._gate_back, self._loss = (
            form_of(compiled, name, dtype)
            for name in ("rms_rows", "rms_back_blocks", "swiglu_rows", "swiglu_back_rows", "cross_entropy_rows")
        )

    def rms(self, x_RD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``x / rms(x) * gain`` and 1 / rms(x), [R, 1] in fp32; ``gain`` fp32, rows of ``x`` may lie apart."""
        rows, size = x_RD.shape
        _fit(gain_D.shape == (size,) and gain_D.dtype == torch.float32, x_RD, gain_D)
        out_RD, scale_R1 = x_RD.new_empty(rows, size), x_RD.new_empty(rows, 1, dtype=torch.float32)
        read = (c_int64(size), _at(x_RD), c_int64(x_RD.stride(0)), _at(gain_D), c_float(eps))
        made = (_at(out_RD), _at(scale_R1))
        share_out(rows, LEAST_ROWS, lambda a, b: self._norm(c_int64(a), c_int64(b), *read, *made))
        return out_RD, scale_R1

    def rms_back(self, grad_RD: Tensor, x_RD: Tensor, gain_D: Tensor, scale_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of :meth:`rms` with respect to ``x`` and, in fp32, ``gain``."""
        (rows, size), blocks = x_RD.shape, -(-len(x_RD) // GAIN_BLOCK)
        _fit(gain_D.shape == (size,) and scale_R1.numel() == rows and grad_RD.shape == (rows, size), x_RD, gain_D)
        grad_x_RD = x_RD.new_empty(rows, size)
        grad_gain_BD = x_RD.new_empty(blocks, size, dtype=torch.float32)
        sizes = (c_int64(GAIN_BLOCK), c_int64(rows), c_int64(size), _at(x_RD), c_int64(x_RD.stride(0)))
        rest = (_at(gain_D), _at(scale_R1), _at(grad_RD), _at(grad_x_RD), _at(grad_gain_BD))
        share_out(blocks, 1, lambda a, b: self._norm_back(c_int64(a), c_int64(b), *sizes, *rest))
        return grad_x_RD, grad_gain_BD.sum(dim=0)

    def swiglu(self, gate_up_RF: Tensor, share_R1: Tensor | None = None) -> Tensor:
        """``silu(gate) * up`` of [R, 2F], gate first, times each row's fp32 share."""
        rows, size = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
        _fit(gate_up_RF.shape == (rows, 2 * size) and _shares_fit(share_R1, rows), gate_up_RF, share_R1)
        out_RF = gate_up_RF.new_empty(rows, size)
        read = (c_int64(size), _at(gate_up_RF), _at(share_R1), _at(out_RF))
        share_out(rows, LEAST_ROWS, lambda a, b: self._gate(c_int64(a), c_int64(b), *read))
        return out_RF

    def swiglu_back(
        self, grad_RF: Tensor, gate_up_RF: Tensor, share_R1: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of :meth:`swiglu`, of the shares [R] in fp32 where there are some, and then its result again."""
        rows, size = grad_RF.shape
        _fit(gate_up_RF.shape == (rows, 2 * size) and _shares_fit(share_R1, rows), grad_RF, gate_up_RF, share_R1)
        grad_gate_up, along_R, again_RF = torch.empty_like(gate_up_RF), None, None
        if share_R1 is not None:
            along_R, again_RF = grad_RF.new_empty(rows, dtype=torch.float32), torch.empty_like(grad_RF)
        read = (c_int64(size), _at(gate_up_RF), _at(share_R1), _at(grad_RF))
        made = (_at(grad_gate_up), _at(along_R), _at(again_RF))
        share_out(rows, LEAST_ROWS, lambda a, b: self._gate_back(c_int64(a), c_int64(b), *read, *made))
        return grad_gate_up, along_R, again_RF

    def cross_entropy(self, logits_RV: Tensor, labels_R: Tensor, *, slopes: bool) -> Tensor:
        """Loss of every row in fp32; with ``slopes`` the logits become softmax - onehot.

        Raises:
            IndexError: a label that is none of the vocabulary.
        """
        rows, size = logits_RV.shape
        labels_R = labels_R.to(torch.int64).contiguous()
        _fit(labels_R.shape == (rows,) and logits_RV.is_contiguous(), logits_RV, labels_R)
        bad_R = labels_R[(labels_R < 0) | (labels_R >= size)]
        if len(bad_R):
            raise IndexError(f"label {int(bad_R[0])} lies outside of the vocabulary, 0 to {size - 1}")
        loss_R = logits_RV.new_empty(rows, dtype=torch.float32)
        read = (c_int64(size), _at(logits_RV), _at(labels_R), _at(loss_R), c_int64(int(slopes)))
        share_out(rows, 1, lambda a, b: self._loss(c_int64(a), c_int64(b), *read))
        return loss_R


@functools.cache
def layer_passes(dtype: torch.dtype) -> LayerPasses | None:
    """The compiled functions; None where there is no compiler, they are switched off or the dtype has none."""
    compiled = library_with("rms_rows", dtype)
    return None if compiled is None else LayerPasses(compiled, dtype)


def _shares_fit(share_R1: Tensor | None, rows: int) -> bool:
    return share_R1 is None or (share_R1.shape == (rows, 1) and share_R1.dtype == torch.float32)


def _fit(fits: bool, *operands: Tensor | None) -> None:
    must_fit(fits, "sizes do not belong together", *operands)


def _at(values: Tensor | None) -> c_void_p:
    return c_void_p(None if values is None else values.data_ptr())
