"""Fullest sequences from what waits, and cuts that never part a media item."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from omni_ray.data.packing import best_fit, cut_row, fill, sample_rows, slice_sample
from omni_ray.types.batch import IGNORE
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, MediaSpan


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_the_best_of_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, 40, size=9)]
    budget = int(rng.integers(40, 120))
    chosen = best_fit(lengths, budget)
    sums = [
        lengths[0] + sum(lengths[i] for i in group)
        for size in range(9)
        for group in combinations(range(1, 9), size)
        if lengths[0] + sum(lengths[i] for i in group) <= budget
    ]
    assert chosen[0] == 0, "the oldest never waits"
    assert chosen == sorted(set(chosen))
    assert sum(lengths[i] for i in chosen) == max(sums)


def test_earlier_samples_are_preferred() -> None:
    assert best_fit([10, 5, 5, 5, 10], 20) == [0, 1, 2]
    assert best_fit([10, 7, 5, 5], 20) == [0, 2, 3]
    assert best_fit([20, 1], 20) == [0]


@pytest.mark.parametrize(("median", "sigma", "budget"), [(60, 0.8, 512), (300, 1.0, 4096)])
def test_log_normal_lengths_fill_their_sequences(median: int, sigma: float, budget: int) -> None:
    rng = np.random.default_rng(1)
    waiting: list[int] = []
    filled = []
    for _ in range(500):
        while len(waiting) < 64:
            waiting.append(min(budget, max(1, round(median * float(np.exp(sigma * rng.standard_normal()))))))
        chosen = best_fit(waiting, budget)
        filled.append(sum(waiting[i] for i in chosen))
        waiting = [rows for i, rows in enumerate(waiting) if i not in set(chosen)]
    assert fill(filled, budget) > 0.99


def test_cuts_go_round_what_is_held() -> None:
    held = ((4, 10), (10, 12), (20, 25))
    cuts = {room: cut_row(30, 0, room, held) for room in (3, 4, 7, 10, 11, 12, 15, 22, 25, 29, 30, 99)}
    assert cuts == {3: 3, 4: 4, 7: 4, 10: 10, 11: 10, 12: 12, 15: 15, 22: 20, 25: 25, 29: 29, 30: 30, 99: 30}
    assert cut_row(30, 4, 3, held) == 4, "nothing fits: the item is longer than the room"
    assert cut_row(30, 12, 5, held) == 17


def test_a_slice_keeps_rows_labels_and_whole_items() -> None:
    span = MediaSpan(modality=Modality.SPEECH, name="s", kind="speech", offset=6, length=4, cost=4.0, target=True)
    seen = MediaSpan(modality=Modality.VISION, name="i", kind="image", offset=1, length=2, cost=8.0)
    encoded = EncodedSample(
        key="k",
        kind="x",
        ids_T5=np.arange(60).reshape(12, 5),
        labels_T5=np.where(np.arange(60) % 3, IGNORE, 1).reshape(12, 5),
        loss_kind_T=np.arange(12) % 3,
        spans=(seen, span),
    )
    rows = sample_rows(encoded, 2.5)
    assert (rows.by_modality, rows.total, rows.held, rows.cost) == ((6, 2, 4), 12, ((1, 3), (5, 10)), 2.5)
    first, second = slice_sample(encoded, 0, 5), slice_sample(encoded, 5, None)
    assert (len(first), len(second)) == (5, 7)
    assert [s.offset for s in first.spans + second.spans] == [1, 1]
    assert np.array_equal(np.concatenate([first.ids_T5, second.ids_T5]), encoded.ids_T5)
    assert np.array_equal(np.concatenate([first.labels_T5, second.labels_T5]), encoded.labels_T5)
    assert slice_sample(encoded, 0, None) is encoded
    with pytest.raises(DataError, match=r"rows 0..8 of k cut s at rows 6"):
        slice_sample(encoded, 0, 8)
