"""Cutting an embedding batch into pieces that travel one after another, and joining them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from omni_ray.types.batch import EmbeddingBatch


def split(batch: EmbeddingBatch, num_chunks: int) -> list[EmbeddingBatch]:
    """Cut into ``num_chunks`` consecutive pieces whose rows differ by one at most; an item may lie in several.

    Cut by rows, not by items: otherwise the largest item, not ``num_chunks``, would bound the memory of a piece.

    Args:
        batch: Any embedding batch, an empty one too.  num_chunks: Pieces, at least 1.
    Returns:
        Exactly ``num_chunks`` batches (views of the same storage), which :func:`join` puts together bit for bit.
    Source: LongCat-Flash-Omni report, Figure 9 (items 6 and 7 travel in parts).
    """
    if num_chunks == 1:
        return [batch]
    total = sum(batch.lengths)
    cuts = [total * chunk // num_chunks for chunk in range(num_chunks + 1)]
    return [_rows(batch, first, last) for first, last in pairwise(cuts)]


def _rows(batch: EmbeddingBatch, first: int, last: int) -> EmbeddingBatch:
    """Rows ``first`` to ``last`` (exclusive) of a batch."""
    ids, lengths, starts = [], [], []
    row = 0
    for item, start, length in parts_of(batch):
        low, high = max(first, row), min(last, row + length)
        if high > low:
            ids.append(item)
            starts.append(start + low - row)
            lengths.append(high - low)
        row += length
    return EmbeddingBatch(
        values_ID=batch.values_ID[first:last], item_ids=tuple(ids), lengths=tuple(lengths), starts=tuple(starts)
    )


def parts_of(batch: EmbeddingBatch) -> Iterator[tuple[int, int, int]]:
    """(item, first row inside the item, rows) of every part of a batch, in the order of its rows."""
    starts = batch.starts or (0,) * len(batch.item_ids)
    return zip(batch.item_ids, starts, batch.lengths, strict=True)


def join(pieces: Sequence[EmbeddingBatch]) -> EmbeddingBatch:
    """The inverse of :func:`split`; also joins what several encoder ranks sent."""
    if len(pieces) == 1:
        return pieces[0]
    return joined_parts(pieces, torch.cat([piece.values_ID for piece in pieces]))


def joined_parts(pieces: Sequence[EmbeddingBatch], values_ID: torch.Tensor) -> EmbeddingBatch:
    """A batch over ``values_ID`` (the pieces' rows, one after another) that names their parts, neighbours merged."""
    merged: list[list[int]] = []
    for piece in pieces:
        for item, start, length in parts_of(piece):
            if merged and merged[-1][0] == item and merged[-1][1] + merged[-1][2] == start:
                merged[-1][2] += length
            else:
                merged.append([item, start, length])
    starts = tuple(start for _, start, _ in merged)
    return EmbeddingBatch(
        values_ID=values_ID,
        item_ids=tuple(item for item, _, _ in merged),
        lengths=tuple(length for _, _, length in merged),
        starts=starts if any(starts) else (),
    )


def gathered(pieces: Sequence[EmbeddingBatch]) -> EmbeddingBatch:
    """Like :func:`join`, into memory of its own, one piece after another.

    Pieces may be views of shared memory, which must not be written to and should be let go soon; an embedding that gets
    a gradient needs memory of its own anyway, so nothing is copied twice.
    """
    total = sum(piece.values_ID.shape[0] for piece in pieces)
    values_ID = pieces[0].values_ID.new_empty(total, *pieces[0].values_ID.shape[1:])
    start = 0
    for piece in pieces:
        stop = start + piece.values_ID.shape[0]
        values_ID[start:stop] = piece.values_ID
        start = stop
    return joined_parts(pieces, values_ID)
