"""The latent cache: pages come back, forks share them until one writes, whatever the order of calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from omni_ray.config.model import model_preset
from omni_ray.inference.cache import KEY_TILE, PAGE_ROWS, LatentCache, value_block
from omni_ray.types.errors import ResourceError

CONFIG = model_preset("tiny").language
WIDTH = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim
SLOTS = 2 * CONFIG.num_layers


def put(cache: LatentCache, sequence: int, values: list[float]) -> None:
    """Append rows; slot ``s`` of a row holds its value plus s."""
    cache.reserve(sequence, len(values))
    places = torch.tensor(cache.places(sequence, len(values)), dtype=torch.int64)
    for slot in range(SLOTS):
        cache.write(slot, places, (torch.tensor(values) + slot)[:, None].expand(-1, WIDTH))
    cache.append(sequence, len(values))


def read(cache: LatentCache, sequence: int, slot: int = 0) -> list[float]:
    length = cache.length(sequence)
    keys_LX = cache.keys(slot, sequence, length).turned_XL.t()
    assert len(keys_LX) % KEY_TILE == 0
    assert bool(torch.isfinite(keys_LX).all())
    return (keys_LX[:length, 0] - slot).tolist()


def test_rows_come_back_where_they_were_put_also_after_growth() -> None:
    cache = LatentCache(CONFIG)
    first, second = cache.open(), cache.open()
    put(cache, first, [1.0, 2.0, 3.0])
    put(cache, second, [float(i) for i in range(3000)])
    put(cache, first, [4.0])
    assert read(cache, first, slot=2) == [1.0, 2.0, 3.0, 4.0]
    assert read(cache, second, slot=3) == [float(i) for i in range(3000)]


def test_bytes_count_live_rows_only() -> None:
    cache = LatentCache(CONFIG)
    sequence = cache.open()
    put(cache, sequence, [0.0] * 10)
    assert cache.bytes == 10 * SLOTS * WIDTH * 4
    cache.crop(sequence, 5)
    assert cache.bytes == 5 * SLOTS * WIDTH * 4


def test_crop_gives_pages_back_and_what_follows_is_as_if_it_never_had_been_longer() -> None:
    cache = LatentCache(CONFIG)
    sequence = cache.open()
    put(cache, sequence, [float(i) for i in range(70)])
    cache.crop(sequence, 4)
    assert cache.pages_held == 1
    put(cache, sequence, [-1.0])
    assert read(cache, sequence) == [0.0, 1.0, 2.0, 3.0, -1.0]


def test_fork_shares_pages_until_one_writes() -> None:
    cache = LatentCache(CONFIG)
    sequence = cache.open()
    put(cache, sequence, [float(i) for i in range(PAGE_ROWS + 6)])
    fork = cache.fork(sequence)
    assert cache.pages_held == 2
    put(cache, fork, [-1.0])
    assert cache.pages_held == 3
    put(cache, sequence, [-2.0])
    assert read(cache, sequence)[-2:] == [69.0, -2.0]
    assert read(cache, fork)[-2:] == [69.0, -1.0]
    assert read(cache, fork)[:PAGE_ROWS] == read(cache, sequence)[:PAGE_ROWS]


def test_a_full_cache_is_refused_with_its_numbers_and_goes_on_after_a_close() -> None:
    cache = LatentCache(CONFIG, max_pages=3)
    first, second = cache.open(), cache.open()
    put(cache, first, [0.0] * (2 * PAGE_ROWS))
    with pytest.raises(ResourceError, match="all 3 pages of 64 rows are held by 2 sequences"):
        cache.reserve(second, 2 * PAGE_ROWS)
    cache.close(first)
    put(cache, second, [1.0] * (2 * PAGE_ROWS))
    assert read(cache, second) == [1.0] * (2 * PAGE_ROWS)


def test_a_page_is_zeros_for_its_next_owner() -> None:
    cache = LatentCache(CONFIG)
    first = cache.open()
    put(cache, first, [7.0] * 40)
    cache.close(first)
    second = cache.open()
    put(cache, second, [1.0])
    assert cache.keys(0, second, 16).turned_XL[:, 1:].abs().sum() == 0


def test_crop_beyond_the_end_is_refused() -> None:
    cache = LatentCache(CONFIG)
    sequence = cache.open()
    put(cache, sequence, [0.0] * 3)
    with pytest.raises(ValueError, match="cannot crop sequence 1 of 3 rows to 4"):
        cache.crop(sequence, 4)


class CacheMachine(RuleBasedStateMachine):
    """Any order of calls against plain lists."""

    @initialize()
    def start(self) -> None:
        self.cache = LatentCache(CONFIG)
        self.rows: dict[int, list[float]] = {}
        self.value = 0.0

    @rule()
    def open(self) -> None:
        self.rows[self.cache.open()] = []

    @rule(data=strategies.data(), count=strategies.sampled_from([1, 1, 2, 31, 64, 65, 200]))
    def grow(self, data: strategies.DataObject, count: int) -> None:
        if self.rows:
            sequence = data.draw(strategies.sampled_from(sorted(self.rows)))
            values = [self.value + i for i in range(count)]
            self.value += count
            put(self.cache, sequence, values)
            self.rows[sequence] = self.rows[sequence] + values

    @rule(data=strategies.data(), share=strategies.floats(0, 1))
    def crop(self, data: strategies.DataObject, share: float) -> None:
        if self.rows:
            sequence = data.draw(strategies.sampled_from(sorted(self.rows)))
            length = int(share * len(self.rows[sequence]))
            self.cache.crop(sequence, length)
            self.rows[sequence] = self.rows[sequence][:length]

    @rule(data=strategies.data())
    def fork(self, data: strategies.DataObject) -> None:
        if self.rows:
            sequence = data.draw(strategies.sampled_from(sorted(self.rows)))
            self.rows[self.cache.fork(sequence)] = list(self.rows[sequence])

    @rule(data=strategies.data())
    def close(self, data: strategies.DataObject) -> None:
        if self.rows:
            sequence = data.draw(strategies.sampled_from(sorted(self.rows)))
            self.cache.close(sequence)
            del self.rows[sequence]

    @invariant()
    def rows_are_right_and_no_page_is_lost(self) -> None:
        held: set[int] = set()
        for sequence, values in self.rows.items():
            assert self.cache.length(sequence) == len(values)
            assert read(self.cache, sequence, slot=1) == values
            held |= set(self.cache.pages(sequence))
        assert self.cache.pages_held == len(held)


CacheMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_a_sum_over_values_keeps_its_order_whatever_stands_behind() -> None:
    """What the probe promises, on other numbers and shapes than it tried."""
    generator = torch.Generator().manual_seed(7)
    block = value_block()
    probs_QL, values_LX = torch.rand(48, block, generator=generator), torch.randn(block, 200, generator=generator)
    for length in range(KEY_TILE, block, KEY_TILE):
        padded_QL = probs_QL.clone()
        padded_QL[:, length:] = 0.0
        for width in (24, 64, 160):
            short_QC = probs_QL[:, :length].contiguous() @ values_LX[:length, :width]
            assert torch.equal(short_QC, padded_QL @ values_LX[:, :width])
