"""Longest-processing-time dispatch: BalanceData of models.md section 7."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Rank of every item: by falling cost (ties: lower index), each onto the least-loaded rank (ties: lower rank).

    Args:
        costs: Cost per item.  ranks: How many ranks share them, at least 1.
    Returns:
        One rank per item, in item order.
    Source: LongCat-Flash-Omni report, BalanceData; the rule itself is models.md section 7 [A].
    """
    heap = [(0.0, rank) for rank in range(ranks)]
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        chosen[index] = rank
        heapq.heappush(heap, (load + costs[index], rank))
    return chosen


def light_ends(media_costs: Sequence[float]) -> list[int]:
    """Order of micro-batches that hides encoder time: the lightest in media first, the next lightest last.

    Encoders cannot run ahead of the first micro-batch; after the last, their backward has nothing to hide behind.
    """
    by_cost = sorted(range(len(media_costs)), key=lambda i: (media_costs[i], i))
    if len(by_cost) < 3:
        return by_cost
    return [by_cost[0], *sorted(by_cost[2:], key=lambda i: (-media_costs[i], i)), by_cost[1]]
