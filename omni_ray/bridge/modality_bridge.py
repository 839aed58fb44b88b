"""The modality bridge: feature rows into the language sequence, their gradients back to where they came from.

Forward is a permutation of rows, backward the same permutation read the other way, so the two are adjoint by
construction and no value is ever added or rounded on the way.  Source: LongCat-Flash-Omni report, ModalityBridge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omni_ray.bridge.chunk import parts_of
from omni_ray.types.batch import EmbeddingBatch, ItemRoute
from omni_ray.types.errors import PlanError
from omni_ray.types.modality import FEATURE_MODALITIES


def rows_of(batch: EmbeddingBatch, routes: Mapping[int, ItemRoute]) -> Tensor:
    """Row numbers in the packed micro-batch for every row of ``batch``, [I] int64.

    Raises:
        PlanError: an item has no route, or a part lies outside it.
    """
    pieces = []
    for item_id, start, length in parts_of(batch):
        route = routes.get(item_id)
        if route is None:
            raise PlanError(f"item {item_id} arrived without a route; the plan knows {sorted(routes)}")
        if start + length > route.length:
            raise PlanError(f"item {item_id} arrived with {start + length} rows, its route holds {route.length}")
        pieces.append(torch.arange(route.offset + start, route.offset + start + length))
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def check_arrivals(batches: Sequence[EmbeddingBatch], routes: Mapping[int, ItemRoute]) -> None:
    """Refuse features that do not cover their routes exactly once.

    Raises:
        PlanError: names the item, the rows that came and the rows that its route holds.
    """
    arrived: dict[int, int] = {}
    for batch in batches:
        for item_id, _, length in parts_of(batch):
            arrived[item_id] = arrived.get(item_id, 0) + length
    for item_id, rows in arrived.items():
        if item_id not in routes:
            raise PlanError(f"item {item_id} arrived without a route; the plan knows {sorted(routes)}")
        if rows != routes[item_id].length:
            raise PlanError(f"item {item_id} arrived with {rows} rows, its route holds {routes[item_id].length}")
    missing = [i for i, route in routes.items() if route.modality in FEATURE_MODALITIES and i not in arrived]
    if missing:
        raise PlanError(f"items {missing} have routes, yet their features never arrived")


def place(embeddings_TD: Tensor, batches: Sequence[EmbeddingBatch], routes: Mapping[int, ItemRoute]) -> Tensor:
    """Overwrite the routed rows of a packed sequence with features; differentiable in both arguments.

    Args:
        embeddings_TD: [T, D] embeddings of the packed rows.
        batches: What the encoder ranks sent, whole or in parts, in any order, of any float dtype and on any device;
            empty ones are normal.
        routes: Items of this micro-batch by id.

    Raises:
        PlanError: unknown or missing items, wrong lengths, or a feature width that is not D.
    """
    batches = [batch for batch in batches if batch.item_ids]
    for batch in batches:
        if batch.values_ID.shape[-1] != embeddings_TD.shape[-1]:
            raise PlanError(
                f"features are {batch.values_ID.shape[-1]} wide, the language model {embeddings_TD.shape[-1]}; "
                "set the projector's output_size to the language hidden_size"
            )
    check_arrivals(batches, routes)
    if not batches:
        return embeddings_TD
    rows = torch.cat([rows_of(batch, routes) for batch in batches])
    values = torch.cat([batch.values_ID.to(embeddings_TD) for batch in batches])
    return embeddings_TD.index_copy(0, rows.to(embeddings_TD.device), values)


def take_back(gradient_ID: Tensor, batch: EmbeddingBatch) -> EmbeddingBatch:
    """The gradient of a feature batch, addressed like the batch it belongs to."""
    return EmbeddingBatch(values_ID=gradient_ID, item_ids=batch.item_ids, lengths=batch.lengths, starts=batch.starts)
