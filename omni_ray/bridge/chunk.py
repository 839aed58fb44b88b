"""Cutting an embedding batch into pieces that travel one after another, and joining them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omni_ray.types.batch import EmbeddingBatch


def split(batch: EmbeddingBatch, num_chunks: int) -> list[EmbeddingBatch]:
    """Cut by whole items into ``num_chunks`` consecutive pieces of nearly equal rows; some may be empty.

    Args:
        batch: Any embedding batch, an empty one too.  num_chunks: Pieces, at least 1.
    Returns:
        Exactly ``num_chunks`` batches (views of the same storage), which :func:`join` puts together bit for bit.
    """
    total = sum(batch.lengths)
    pieces: list[EmbeddingBatch] = []
    first, start = 0, 0
    for chunk in range(num_chunks):
        last, stop = first, start
        limit = total * (chunk + 1) / num_chunks
        while last < len(batch.lengths) and (chunk == num_chunks - 1 or stop + batch.lengths[last] / 2 <= limit):
            stop += batch.lengths[last]
            last += 1
        pieces.append(
            EmbeddingBatch(
                values_ID=batch.values_ID[start:stop],
                item_ids=batch.item_ids[first:last],
                lengths=batch.lengths[first:last],
            )
        )
        first, start = last, stop
    return pieces


def join(pieces: Sequence[EmbeddingBatch]) -> EmbeddingBatch:
    """The inverse of :func:`split`; also joins what several encoder ranks sent."""
    if len(pieces) == 1:
        return pieces[0]
    return EmbeddingBatch(
        values_ID=torch.cat([piece.values_ID for piece in pieces]),
        item_ids=tuple(item for piece in pieces for item in piece.item_ids),
        lengths=tuple(length for piece in pieces for length in piece.lengths),
    )
