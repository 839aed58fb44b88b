"""Two-stage redistribution: the report's Figure 9, any inner group against plain indexing, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_ray.balance.dispatch import assign
from omni_ray.bridge.redistribute import (
    BridgeLayout,
    aggregate,
    gather_hidden,
    redistribute,
    redistribute_back,
    scatter_back,
    slices,
)
from omni_ray.types.errors import PlanError

FIGURE_9 = {0: 8, 1: 1, 2: 3, 3: 4, 4: 4, 5: 4, 6: 12, 7: 15}
"""Rows per image that give the figure's balanced ranks (networks.md section 7)."""
MICRO_BATCHES = ((0, 1, 2), (3, 4), (5, 6), (7,))


def figure_9_lists() -> list[list[tuple[int, int]]]:
    ranks = assign([FIGURE_9[i] for i in range(8)], 4)
    by_cost = sorted(FIGURE_9, key=lambda i: (-FIGURE_9[i], i))
    return [[(i, FIGURE_9[i]) for i in by_cost if ranks[i] == rank] for rank in range(4)]


def test_figure_9_ranks_and_chunks() -> None:
    lists = figure_9_lists()
    assert [[item for item, _ in items] for items in lists] == [[7], [6], [0, 5], [3, 4, 2, 1]]
    layout = BridgeLayout.of(lists, num_chunks=3)
    named = [[(p.item, p.start) for p in layout.parts if p.chunk == chunk] for chunk in range(3)]
    assert named[0] == [(7, 0), (6, 0), (0, 0), (3, 0)], "7a 6a 0a 3"
    assert named[1] == [(7, 5), (6, 4), (0, 4), (4, 0)], "7b 6b 0b 4 (the figure prints 3 again)"
    assert named[2] == [(7, 10), (6, 8), (5, 0), (2, 0), (1, 0)], "7c 6c 5 2 1"
    assert [layout.chunk_rows(chunk) for chunk in range(3)] == [(0, 17), (17, 34), (34, 51)]
    assert layout.rows == 51
    assert [(p.item, p.start, p.rows) for p in layout.select((0, 1, 2))] == [(0, 0, 4), (0, 4, 4), (1, 0, 1), (2, 0, 3)]


def test_figure_9_gradients_equal_the_single_process_bit_for_bit() -> None:
    """Four encoders, cp 2: values, loss and every gradient against plain autograd over whole items."""
    torch.manual_seed(0)
    lists, hidden = figure_9_lists(), 6
    weight_HH = torch.randn(hidden, hidden)
    rows = [torch.randn(sum(n for _, n in items), hidden) for items in lists]
    whole = [piece.clone().requires_grad_() for piece in rows]
    of_item: dict[int, Tensor] = {}
    for items, leaf in zip(lists, whole, strict=True):
        of_item |= dict(zip([i for i, _ in items], leaf.split([n for _, n in items]), strict=True))
    layout = BridgeLayout.of(lists, num_chunks=3)
    stores = redistribute(layout, rows, cp=2)
    assert [store.values_IH.shape for store in stores] == [(51, 3), (51, 3)]
    for members in MICRO_BATCHES:
        expected = torch.cat([of_item[i] for i in members])
        expected_loss = torch.tanh(expected @ weight_HH).sum()
        expected_loss.backward()
        arrived = gather_hidden([store.read(members) for store in stores]).requires_grad_()
        assert torch.equal(arrived, expected)
        loss = torch.tanh(arrived @ weight_HH).sum()
        loss.backward()
        assert torch.equal(loss, expected_loss)
        assert arrived.grad is not None
        for store, part in zip(stores, slices(arrived.grad, 2), strict=True):
            store.write_gradient(members, part)
    for back, leaf in zip(redistribute_back(layout, stores), whole, strict=True):
        assert leaf.grad is not None
        assert torch.equal(back, leaf.grad)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=8),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4]),
    st.randoms(use_true_random=False),
)
def test_any_group_delivers_each_row_once(sizes: list[list[int]], num_chunks: int, cp: int, random) -> None:  # type: ignore[no-untyped-def]
    """Empty ranks and empty chunks included; the way back is the adjoint."""
    ids = iter(range(1000))
    lists = [[(next(ids), rows) for rows in items] for items in sizes]
    layout = BridgeLayout.of(lists, num_chunks)
    rows = [torch.randn(sum(n for _, n in items), 4) for items in lists]
    stores = redistribute(layout, rows, cp)
    chosen = [item for items in lists for item, _ in items]
    random.shuffle(chosen)
    plain = {
        i: part
        for items, r in zip(lists, rows, strict=True)
        for (i, _), part in zip(items, r.split([n for _, n in items]), strict=True)
    }
    arrived = gather_hidden([store.read(chosen) for store in stores])
    assert torch.equal(arrived, torch.cat([plain[i] for i in chosen]) if chosen else torch.zeros(0, 4))
    gradient = torch.randn_like(arrived)
    for store, part in zip(stores, slices(gradient, cp), strict=True):
        store.write_gradient(chosen, part)
    back = redistribute_back(layout, stores)
    forward_product = (arrived.double() * gradient).sum()
    backward_product = sum((r.double() * b).sum() for r, b in zip(rows, back, strict=True))
    torch.testing.assert_close(forward_product, torch.as_tensor(backward_product, dtype=torch.float64))
    largest = max(last - first for first, last in map(layout.chunk_rows, range(num_chunks)))
    assert largest <= sum(-(-sum(items) // num_chunks) for items in sizes), "a chunk is its share of every list"


def test_gradient_of_unread_rows_is_zero() -> None:
    layout = BridgeLayout.of([[(0, 2)], [(1, 3)]], 2)
    stores = redistribute(layout, [torch.ones(2, 2), torch.ones(3, 2)], 1)
    stores[0].write_gradient([1], torch.ones(3, 2))
    first, second = redistribute_back(layout, stores)
    assert torch.equal(first, torch.zeros(2, 2))
    assert torch.equal(second, torch.ones(3, 2))


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(PlanError, match="item 4 stands in the lists of ranks 0 and 2; encode it once"):
        BridgeLayout.of([[(4, 2)], [], [(4, 2)]], 1)
    with pytest.raises(PlanError, match="num_chunks is 0; choose 1 or more"):
        BridgeLayout.of([[]], 0)
    layout = BridgeLayout.of([[(0, 2)], [(1, 2)]], 1)
    with pytest.raises(
        PlanError, match=r"encoder ranks send features \[3, 4\] wide; set every projector's output_size"
    ):
        aggregate(layout, 0, [torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(PlanError, match="rank 1 sent 1 rows in chunk 0, the layout has 2"):
        aggregate(layout, 0, [torch.zeros(2, 3), torch.zeros(1, 3)])
    with pytest.raises(PlanError, match="hidden size 3 cannot be cut over cp 2; choose a divisor"):
        slices(torch.zeros(2, 3), 2)
    with pytest.raises(PlanError, match="item 9 is asked for, yet no rank of the inner group holds it"):
        layout.select([9])
    assert [part.shape[0] for part in scatter_back(layout, 0, torch.zeros(4, 3))] == [2, 2]
