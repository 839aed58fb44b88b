"""The shuffle is a bijection at every size, another one for every key, and holds no list."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from omni_ray.data.permute import ROUNDS, TABLE_LIMIT, place, walk

KEYS = tuple(range(11, 11 + ROUNDS))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 100, 1023, 4097, 70_001])
def test_every_number_once(size: int) -> None:
    assert sorted(walk(KEYS, size, i) for i in range(size)) == list(range(size))


def test_long_streams_pass_without_repeats() -> None:
    size = TABLE_LIMIT + 1
    first = [place(0, "text", size, n) for n in range(size)]
    assert sorted(first) == list(range(size))
    assert place(0, "text", size, size) != first[0], "the next pass is another permutation"
    others = [place(seed, name, size, 5) for seed, name in ((1, "text"), (0, "speech"), (2, "text"))]
    assert len({first[5], *others}) == 4


def test_neighbours_are_scattered() -> None:
    size = 1_000_003
    found = np.array([walk(KEYS, size, i) for i in range(20_000)]) / size
    assert abs(found.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    bins = np.histogram(found, bins=100, range=(0, 1))[0]
    assert ((bins - 200) ** 2 / 200).sum() < 160, "chi-square of 99 degrees of freedom, p about 1e-4"


def test_a_thousand_million_rows_cost_no_memory() -> None:
    tracemalloc.start()
    drawn = {place(3, "web", 10**9, n) for n in range(0, 10**9, 1_000_003)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(drawn) == 1000
    assert peak < 500_000


def test_short_streams_keep_the_order_they_always_had() -> None:
    """Numpy may change its permutation between versions; a run that goes on must not."""
    assert [place(0, "text", 10, n) for n in range(20)] == GOLDEN
    assert [place(0, "web", 10**9, n) for n in range(3)] == GOLDEN_LONG


GOLDEN = [5, 7, 4, 9, 0, 2, 3, 1, 6, 8, 9, 1, 3, 7, 4, 2, 0, 8, 6, 5]
GOLDEN_LONG = [263274270, 2946109, 199874034]
