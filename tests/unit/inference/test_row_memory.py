"""Buffers kept between forwards: few sizes, and never more views than a bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni_ray.config.model import model_preset
from omni_ray.inference import row_memory
from omni_ray.inference.cache import LatentCache
from omni_ray.inference.requests import AnswerOptions
from omni_ray.inference.row_forward import RowForward
from omni_ray.inference.row_weights import ROW_BLOCK, row_weights
from omni_ray.inference.rows import RowSampler, Vocabulary
from omni_ray.models.llm import LanguageModel

CONFIG = model_preset("tiny").language


def test_only_the_last_sizes_are_kept_and_bits_do_not_depend_on_it() -> None:
    model = LanguageModel(CONFIG)
    x_TH = torch.randn(70, CONFIG.hidden_size)

    def last(rows: int, forward: RowForward) -> torch.Tensor:
        sequences = [forward.cache.open() for _ in range(rows)]
        return forward.advance(x_TH[:rows], [(sequence, 1) for sequence in sequences])

    used = RowForward(row_weights(model), 1e4, LatentCache(CONFIG))
    for rows in [*range(1, 13), 70, 3, 1]:
        fresh = RowForward(row_weights(model), 1e4, LatentCache(CONFIG))
        assert torch.equal(last(rows, used), last(rows, fresh))
        assert len(used._memories) <= row_memory.REMEMBERED_SIZES
    assert 70 not in used._memories
    assert 1 in used._memories


def test_views_of_experts_rows_are_bounded() -> None:
    memory = row_memory.RowMemory(row_weights(LanguageModel(CONFIG)), 64)
    for start in range(100):
        for count in range(1, 60):
            span = memory.expert_span(start, count)
            assert span.x_BH.shape == (count, CONFIG.hidden_size)
    assert len(memory._spans) <= row_memory._MOST_SPANS


def test_no_memory_of_a_choice_holds_on_to_exchanged_weights() -> None:
    vocabulary = Vocabulary(eos_id=2, pad_id=3, pause_id=7, text_ids=tuple(range(16, 64)), code_sizes=())
    sampler = RowSampler(vocabulary, CONFIG.vocab_size, CONFIG.codec_vocab_size, torch.device("cpu"))
    model = LanguageModel(CONFIG)
    first, second = row_weights(model), row_weights(model)
    for _ in range(3):
        sampler.add(AnswerOptions(max_tokens=4))
        sampler.next_rows(torch.randn(len(sampler), CONFIG.hidden_size), first)
    sampler.next_rows(torch.randn(3, CONFIG.hidden_size), second)
    assert [memory.weights is second for memory in sampler._memories.values()] == [True]


@pytest.mark.parametrize("fewest", [2, 4, 16])
def test_no_block_of_a_product_has_too_few_rows(fewest: int) -> None:
    weights = replace(row_weights(LanguageModel(CONFIG)), tile=fewest)
    for rows in range(1, 300):
        padded = weights.padded(rows)
        assert rows <= padded < rows + fewest
        last = padded % ROW_BLOCK
        assert last == 0 or last >= fewest
        assert fewest < 16 or padded % 16 == 0
