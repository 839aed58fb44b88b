"""BalanceData and the order of micro-batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omni_ray.balance.dispatch import assign, deal, light_ends

COSTS = st.lists(st.floats(0.1, 100.0), max_size=60)


def test_figure_9_of_the_report() -> None:
    """networks.md section 7: token sizes that give the report's balanced ranks with the rule."""
    ranks = assign([8, 1, 3, 4, 4, 4, 12, 15], 4)
    assert [[i for i, r in enumerate(ranks) if r == rank] for rank in range(4)] == [[7], [6], [0, 5], [1, 2, 3, 4]]


@given(COSTS, st.integers(1, 8))
def test_greedy_bound_holds(costs: list[float], ranks: int) -> None:
    chosen = assign(costs, ranks)
    loads = [sum(c for c, r in zip(costs, chosen, strict=True) if r == rank) for rank in range(ranks)]
    biggest = max(costs, default=0.0)
    assert max(loads) <= sum(costs) / ranks + biggest + 1e-6


@given(COSTS)
def test_light_micro_batches_stand_at_the_ends(costs: list[float]) -> None:
    order = light_ends(costs)
    assert sorted(order) == list(range(len(costs)))
    if len(costs) >= 3:
        inner = min(costs[i] for i in order[1:-1])
        assert max(costs[order[0]], costs[order[-1]]) <= inner


@given(st.lists(st.floats(0.1, 100), max_size=60), st.integers(1, 9))
def test_deal_gives_every_rank_one_of_each_block(costs: list[float], ranks: int) -> None:
    chosen = deal(costs, ranks)
    for start in range(0, len(costs), ranks):
        block = chosen[start : start + ranks]
        assert len(set(block)) == len(block)
    loads = [sum(c for c, r in zip(costs, chosen, strict=True) if r == rank) for rank in range(ranks)]
    if len(costs) % ranks == 0 and costs:
        assert max(loads) - min(loads) <= max(costs) - min(costs) + 1e-6


@given(st.lists(st.floats(0, 100), max_size=60))
def test_light_ends_is_an_order_with_the_lightest_outside(costs: list[float]) -> None:
    order = light_ends(costs)
    assert sorted(order) == list(range(len(costs)))
    if len(costs) >= 3:
        ends = max(1, len(costs) // 8)
        outside = [costs[i] for i in (*order[:ends], *order[-ends:])]
        assert max(outside) <= min([costs[i] for i in order[ends:-ends]], default=100.0)
        assert costs[order[0]] == min(costs)
