"""The latent cache: lengths, crop, fork, growth, bytes."""

from __future__ import annotations

import pytest
import torch

from omni_ray.config.model import model_preset
from omni_ray.inference.cache import LatentCache

CONFIG = model_preset("tiny").language
WIDTH = 48 + 16


def filled(lengths: list[int]) -> LatentCache:
    cache = LatentCache(CONFIG, len(lengths))
    cache.reserve(max(lengths))
    for slot in range(4):
        for sequence, length in enumerate(lengths):
            rows = torch.full((length, WIDTH), float(100 * slot + 10 * sequence)) + torch.arange(length)[:, None]
            cache.write(slot, torch.full((length,), sequence), torch.arange(length), rows)
    cache.append(lengths)
    return cache


def test_rows_come_back_where_they_were_put_also_after_growth() -> None:
    cache = filled([3, 7])
    cache.reserve(200)
    assert torch.equal(cache.keys(2, 1, 2, 7)[0, :, 0], 210.0 + torch.arange(7))
    assert torch.equal(cache.keys(3, 0, 1, 3)[0, :, 5], 300.0 + torch.arange(3))


def test_bytes_count_live_rows_only() -> None:
    cache = filled([3, 7])
    assert cache.bytes == 10 * 4 * WIDTH * 4
    cache.crop(1, 2)
    assert cache.bytes == 5 * 4 * WIDTH * 4


def test_crop_then_append_equals_never_having_been_longer() -> None:
    cache = filled([7])
    cache.crop(0, 4)
    new = torch.full((1, WIDTH), -1.0)
    cache.write(0, torch.tensor([0]), torch.tensor([4]), new)
    cache.append([1])
    assert cache.lengths == [5]
    assert torch.equal(cache.keys(0, 0, 1, 5)[0, :, 0], torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]))


def test_fork_is_a_copy_of_chosen_sequences() -> None:
    cache = filled([3, 7, 5])
    fork = cache.fork([2, 2, 0])
    fork.write(0, torch.tensor([0]), torch.tensor([0]), torch.zeros(1, WIDTH))
    assert fork.lengths == [5, 5, 3]
    assert torch.equal(fork.keys(0, 1, 2, 5)[0, :, 0], 20.0 + torch.arange(5))
    assert float(cache.keys(0, 2, 3, 1)[0, 0, 0]) == 20.0


def test_crop_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot crop sequence 0 of 3 rows to 4"):
        filled([3]).crop(0, 4)
