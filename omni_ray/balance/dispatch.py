"""Longest-processing-time dispatch: BalanceData of networks.md section 7."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Rank of every item: by falling cost (ties: lower index), each onto the least-loaded rank (ties: lower rank).

    Args:
        costs: Cost per item.  ranks: How many ranks share them, at least 1.
    Returns:
        One rank per item, in item order.
    Source: LongCat-Flash-Omni report, BalanceData; the rule itself is networks.md section 7 [A].
    """
    heap = [(0.0, rank) for rank in range(ranks)]
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        chosen[index] = rank
        heapq.heappush(heap, (load + costs[index], rank))
    return chosen


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Language rank of every micro-batch: one of each block of ``ranks`` consecutive ones to each rank.

    Inside a block the costliest goes to the least-loaded rank.  So every rank gets its share of what stands first and
    last, where micro-batches are light in media, and the ranks' loads stay equal.

    Args:
        costs: Language cost per micro-batch, in submission order.  ranks: Language ranks.
    """
    loads = [0.0] * ranks
    chosen = [0] * len(costs)
    for start in range(0, len(costs), ranks):
        block = range(start, min(start + ranks, len(costs)))
        by_load = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for index, rank in zip(sorted(block, key=lambda i: (-costs[i], i)), by_load, strict=False):
            chosen[index] = rank
            loads[rank] += costs[index]
    return chosen


def light_ends(media_costs: Sequence[float]) -> list[int]:
    """Order of micro-batches that hides encoder time: the lightest in media first, the next lightest last.

    Encoders cannot run ahead of the first micro-batches, of which every language rank has one; after the last ones,
    their backward has nothing to hide behind.  An eighth of all stands at each end, light towards the outside; between
    them the heaviest come first.  The order depends on the micro-batches alone, never on pool sizes.
    """
    by_cost = sorted(range(len(media_costs)), key=lambda i: (media_costs[i], i))
    if len(by_cost) < 3:
        return by_cost
    ends = max(1, len(by_cost) // 8)
    first, last = by_cost[: 2 * ends : 2], by_cost[1 : 2 * ends : 2]
    middle = sorted(by_cost[2 * ends :], key=lambda i: (-media_costs[i], i))
    return [*first, *middle, *reversed(last)]
