"""Helpers of packed and streaming networks: items in cache-sized runs, room between utterances, a signal in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

StateT = TypeVar("StateT")

# R packed rows of all utterances, G rows of the layout with gaps


def item_runs(lengths: Sequence[int], most: int) -> list[slice]:
    """Cut packed items into runs of neighbours with at most ``most`` rows together (a longer item stands alone).

    Without a graph to keep, running a network over cache-sized runs spares the trips of every activation to memory;
    rows are tiled (``layers.row_padded``), so the bits of an item do not depend on the cut.

    Args:
        lengths: Rows of every item.
        most: Rows of one run.

    Returns:
        Slices of item numbers, in order; none for no items.
    """
    runs, start, rows = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and rows + length > most:
            runs.append(slice(start, i))
            start, rows = i, 0
        rows += length
    return [*runs, slice(start, len(lengths))] if lengths else []


class GappedRows:
    """Where packed rows of several utterances lie once each has zero rows before and after it.

    A sliding filter over the gapped layout sees zeros beyond the ends of an utterance and never its neighbour, so the
    utterances of a batch may have any lengths and no row is wasted on padding to the longest.
    """

    def __init__(self, lengths: Sequence[int], left: int, right: int, device: torch.device) -> None:
        """Lay out utterances of ``lengths`` rows with ``left`` zeros before and ``right`` zeros after each."""
        ends = list(accumulate(length + left + right for length in lengths))
        self.total = ends[-1] if ends else left + right
        self._spread_GD: Tensor | None = None
        starts = [end - right - length for end, length in zip(ends, lengths, strict=True)]
        pieces = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        self.slot_R = (torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)).to(device)

    def spread(self, x_RD: Tensor) -> Tensor:
        """Packed rows [R, D] -> [G, D], zeros in the gaps; without a graph the next call overwrites the result."""
        if torch.is_grad_enabled():
            return x_RD.new_zeros(self.total, x_RD.shape[-1]).index_copy_(0, self.slot_R, x_RD)
        if self._spread_GD is None or self._spread_GD.shape[1] != x_RD.shape[1]:
            self._spread_GD = x_RD.new_zeros(self.total, x_RD.shape[-1])
        return self._spread_GD.index_copy_(0, self.slot_R, x_RD)

    def collect(self, filtered_GD: Tensor, left: int) -> Tensor:
        """Rows of a filter's output whose window begins ``left`` rows before the row itself: back to [R, D]."""
        return filtered_GD.index_select(0, self.slot_R - left)


def in_pieces(
    step: Callable[[Tensor, StateT], tuple[Tensor, StateT]],
    signal: Tensor,
    state: StateT,
    sizes: Sequence[int],
    dim: int = -1,
) -> tuple[list[Tensor], StateT]:
    """Feed a signal to a streaming step in pieces of the given sizes (the last size repeats until the end).

    Args:
        step: ``(piece, state) -> (output, state)``.
        signal: The whole signal.
        state: State to begin with.
        sizes: Piece sizes along ``dim``, each at least 1.
        dim: Time axis of the signal.

    Returns:
        The outputs in order, and the last state (not flushed).
    """
    outputs, start, turn = [], 0, 0
    while start < signal.shape[dim]:
        size = min(sizes[min(turn, len(sizes) - 1)], signal.shape[dim] - start)
        output, state = step(signal.narrow(dim, start, size), state)
        outputs.append(output)
        start, turn = start + size, turn + 1
    return outputs, state
