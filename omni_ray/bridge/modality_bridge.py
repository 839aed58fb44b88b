"""The modality bridge: feature rows into the language sequence, their gradients back to where they came from.

Forward is a permutation of rows, backward the same permutation read the other way, so the two are adjoint by
construction and no value is ever added or rounded on the way.  Source: LongCat-Flash-Omni report, ModalityBridge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omni_ray.types.batch import EmbeddingBatch, ItemRoute
from omni_ray.types.errors import PlanError


def rows_of(batch: EmbeddingBatch, routes: Mapping[int, ItemRoute]) -> Tensor:
    """Row numbers in the packed micro-batch for every row of ``batch``, [I] int64.

    Raises:
        PlanError: an item has no route, or another length than its route says.
    """
    pieces = []
    for item_id, length in zip(batch.item_ids, batch.lengths, strict=True):
        route = routes.get(item_id)
        if route is None:
            raise PlanError(f"item {item_id} arrived without a route; the plan knows {sorted(routes)}")
        if route.length != length:
            raise PlanError(f"item {item_id} arrived with {length} rows, its route holds {route.length}")
        pieces.append(torch.arange(route.offset, route.offset + length))
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def place(embeddings_TD: Tensor, batches: Sequence[EmbeddingBatch], routes: Mapping[int, ItemRoute]) -> Tensor:
    """Overwrite the routed rows of a packed sequence with features; differentiable in both arguments.

    Args:
        embeddings_TD: [T, D] embeddings of the packed rows.
        batches: What the encoder ranks sent, in any order; empty ones are normal.
        routes: Items of this micro-batch by id.

    Raises:
        PlanError: unknown items, wrong lengths, or a feature width that is not D.
    """
    batches = [batch for batch in batches if batch.item_ids]
    for batch in batches:
        if batch.values_ID.shape[-1] != embeddings_TD.shape[-1]:
            raise PlanError(
                f"features are {batch.values_ID.shape[-1]} wide, the language model {embeddings_TD.shape[-1]}; "
                "set the projector's output_size to the language hidden_size"
            )
    if not batches:
        return embeddings_TD
    rows = torch.cat([rows_of(batch, routes) for batch in batches])
    values = torch.cat([batch.values_ID for batch in batches])
    return embeddings_TD.index_copy(0, rows, values)


def take_back(gradient_ID: Tensor, batch: EmbeddingBatch) -> EmbeddingBatch:
    """The gradient of a feature batch, addressed like the batch it belongs to."""
    return EmbeddingBatch(values_ID=gradient_ID, item_ids=batch.item_ids, lengths=batch.lengths)
