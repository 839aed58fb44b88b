"""Matrices as the compiled functions read them, and the memory that their structures point into."""

# K inputs, N outputs, P panels, B columns of a panel

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_int64, c_void_p
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor


class Matrix(Structure):
    """See ``vectors.h``."""

    _fields_: ClassVar = [("values", c_void_p), ("inputs", c_int64), ("outputs", c_int64)]


class Held:
    """Keeps copies of weights and arrays of structures, and gives their addresses."""

    def __init__(self, panel: int) -> None:
        """``panel``: columns of one panel."""
        self._panel = panel
        self._held: list[Any] = []

    def matrix(self, weight_KN: Tensor) -> Matrix:
        """A copy in panels [P, K, B], the last filled up with zeros."""
        inputs, outputs = weight_KN.shape
        padded_KN = F.pad(weight_KN.detach().float(), (0, -outputs % self._panel))
        panels_PKB = padded_KN.unflatten(1, (-1, self._panel)).transpose(0, 1).contiguous()
        self._held.append(panels_PKB)
        return Matrix(values=panels_PKB.data_ptr(), inputs=inputs, outputs=outputs)

    def values(self, values: Tensor) -> int:
        """Address of a contiguous copy."""
        kept = values.detach().float().contiguous().clone()
        self._held.append(kept)
        address: int = kept.data_ptr()
        return address

    def array(self, kind: Any, values: list[Any]) -> Any:
        """Pointer to structures or numbers, one after another."""
        array = (kind * len(values))(*values)
        self._held.append(array)
        return ctypes.cast(array, POINTER(kind))
