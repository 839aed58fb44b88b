"""Small pieces that several networks share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

ROW_MULTIPLE = 16
"""Matrix products give a row the same bits whenever their row count is a multiple of this (CPU, fp32)."""


def row_padded(function: Callable[[Tensor], Tensor], x_RD: Tensor) -> Tensor:
    """Apply a row-wise function on zero-padded rows, so that a row's bits do not depend on who stands beside it.

    A matrix product's bits change with its row count (1, 2 and 3 rows differ from more), and vectorised elementwise
    kernels treat the odd end of a tensor apart; both agree for every multiple of 16 rows.

    Args:
        function: Maps [R, D] to [R, D'] row by row.
        x_RD: Input rows, R may be zero.

    Returns:
        [R, D'].
    """
    rows = x_RD.shape[0]
    missing = -rows % ROW_MULTIPLE
    if not missing:
        return function(x_RD)
    return function(functional.pad(x_RD, (0, 0, 0, missing)))[:rows]
