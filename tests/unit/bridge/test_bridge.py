"""The bridge delivers each item once and brings its gradient back; backward is the adjoint of forward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_ray.bridge.chunk import gathered, join, split
from omni_ray.bridge.modality_bridge import place, rows_of, take_back
from omni_ray.bridge.route import route_items
from omni_ray.types.batch import EmbeddingBatch, ItemRoute
from omni_ray.types.errors import PlanError
from omni_ray.types.modality import Modality


def batch_of(lengths: list[int], ids: list[int] | None = None, width: int = 3) -> EmbeddingBatch:
    rows = torch.arange(sum(lengths) * width, dtype=torch.float32).view(-1, width)
    ids = list(range(len(lengths))) if ids is None else ids
    return EmbeddingBatch(values_ID=rows, item_ids=tuple(ids), lengths=tuple(lengths))


def routes_of(lengths: list[int], gap: int = 2) -> dict[int, ItemRoute]:
    routes, offset = {}, gap
    for item, length in enumerate(lengths):
        routes[item] = ItemRoute(
            id=item,
            modality=Modality.VISION,
            cost=float(length),
            encoder_rank=0,
            language_rank=0,
            micro_batch=0,
            offset=offset,
            length=length,
            tile=0,
        )
        offset += length + gap
    return routes


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 8))
def test_chunks_join_to_the_same_bits(lengths: list[int], num_chunks: int) -> None:
    whole = batch_of(lengths)
    pieces = split(whole, num_chunks)
    assert len(pieces) == num_chunks
    again = join(pieces)
    assert torch.equal(again.values_ID, whole.values_ID)
    assert (again.item_ids, again.lengths) == (whole.item_ids, whole.lengths)


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 8))
def test_chunks_differ_by_one_row_at_most(lengths: list[int], num_chunks: int) -> None:
    rows = [piece.values_ID.shape[0] for piece in split(batch_of(lengths), num_chunks)]
    assert max(rows) - min(rows) <= 1
    assert rows == [sum(piece.lengths) for piece in split(batch_of(lengths), num_chunks)]


def test_an_item_in_parts_is_placed_whole_and_a_lost_part_is_seen() -> None:
    whole, routes, base = batch_of([7, 2]), routes_of([7, 2]), torch.zeros(20, 3)
    pieces = split(whole, 3)
    assert [piece.item_ids for piece in pieces] == [(0,), (0,), (0, 1)]
    assert torch.equal(place(base, list(reversed(pieces)), routes), place(base, [whole], routes))
    assert torch.equal(gathered(pieces).values_ID, whole.values_ID)
    with pytest.raises(PlanError, match="item 0 arrived with 4 rows, its route holds 7"):
        place(base, [pieces[0], pieces[2]], routes)
    with pytest.raises(PlanError, match=r"items \[1\] have routes, yet their features never arrived"):
        place(base, pieces[:2] + split(batch_of([7]), 7)[6:], routes)


def test_overlapping_routes_are_refused_by_name() -> None:
    routes = list(routes_of([4, 4]).values())
    crossed = [routes[0], dataclasses.replace(routes[1], offset=routes[0].offset + 3)]
    with pytest.raises(
        PlanError, match=r"items 0 and 1 of micro-batch 0 both claim rows 5\.\.5; routes must be disjoint"
    ):
        route_items(crossed)
    assert route_items(routes).select(0, Modality.VISION) == tuple(routes)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=10), st.integers(1, 4), st.randoms(use_true_random=False))
def test_backward_is_the_adjoint(lengths: list[int], ranks: int, random) -> None:  # type: ignore[no-untyped-def]
    """<place(x), y> = <x, take_back(y)> over any spread of items on ranks, empty ranks included."""
    routes = routes_of(lengths)
    owner = [random.randrange(ranks) for _ in lengths]
    total = routes[len(lengths) - 1].offset + lengths[-1] + 2
    sent = []
    for rank in range(ranks):
        mine = [i for i, r in enumerate(owner) if r == rank]
        rows = torch.randn(sum(lengths[i] for i in mine), 3, dtype=torch.float64, requires_grad=True)
        sent.append(EmbeddingBatch(values_ID=rows, item_ids=tuple(mine), lengths=tuple(lengths[i] for i in mine)))
    base = torch.zeros(total, 3, dtype=torch.float64)
    placed = place(base, sent, routes)
    for batch in sent:
        assert torch.equal(placed[rows_of(batch, routes)], batch.values_ID)
    y = torch.randn_like(placed)
    (placed * y).sum().backward()
    for batch in sent:
        if batch.item_ids:
            gradient = take_back(batch.values_ID.grad, batch)
            assert torch.equal(gradient.values_ID, y[rows_of(batch, routes)])


def test_wrong_width_is_refused_with_the_mend() -> None:
    with pytest.raises(PlanError, match="features are 3 wide, the language model 4; set the projector's output_size"):
        place(torch.zeros(9, 4), [batch_of([2])], routes_of([2]))


def test_unknown_item_and_wrong_length_are_refused() -> None:
    with pytest.raises(PlanError, match="item 7 arrived without a route"):
        place(torch.zeros(9, 3), [batch_of([2], ids=[7])], routes_of([2]))
    with pytest.raises(PlanError, match="item 0 arrived with 1 rows, its route holds 2"):
        place(torch.zeros(9, 3), [batch_of([1])], routes_of([2]))
