"""The objective by hand-made logits: every term is a token mean over the step, whatever micro-batch a row is in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from omni_ray.config.curriculum import LossWeights
from omni_ray.training.loss import TERMS, means, objective, term_scales
from omni_ray.types.batch import IGNORE, LossKind, OmniBatch

WEIGHTS = LossWeights(text=1.75, audio=0.25, audio_text=1.5, first_audio=0.1, vision=0.25, pad_text=0.1)


class Uniform:
    """Heads that give every id the same probability: 1/8 text, 1/4 codec."""

    @property
    def text_head(self) -> Tensor:
        return torch.zeros(8, 3)

    def audio_head(self, codebook: int) -> Tensor:
        return torch.zeros(4, 3)


def batch_of(kinds: list[LossKind], audio_rows: int = 0) -> OmniBatch:
    count = len(kinds)
    labels = torch.full((count, 5), IGNORE)
    for row, kind in enumerate(kinds):
        if kind != LossKind.NONE:
            labels[row, 0] = row % 8
    labels[:audio_rows, 1] = 1
    labels[1:audio_rows, 2:] = 2
    return OmniBatch(
        ids_T5=torch.zeros(count, 5, dtype=torch.int64),
        cu_seqlens=(0, count),
        labels_T5=labels,
        loss_kind_T=torch.tensor([int(kind) for kind in kinds]),
        positions=torch.arange(count),
    )


TEXT_CE, AUDIO_CE = math.log(8), math.log(4)


def loss_of(batch: OmniBatch, counts: dict[str, int]) -> float:
    hidden = torch.zeros(len(batch.loss_kind_T), 3)
    return float(objective(Uniform(), hidden, batch, term_scales(WEIGHTS, counts))[0])


@pytest.mark.parametrize(
    ("kind", "term", "weight"),
    [(LossKind.TEXT, "text", 1.75), (LossKind.VISION, "vision", 0.25), (LossKind.AUDIO_TEXT, "audio_text", 1.5)],
)
def test_text_terms_are_weighted_means(kind: LossKind, term: str, weight: float) -> None:
    batch = batch_of([kind, LossKind.NONE, kind, kind])
    assert loss_of(batch, {term: 3}) == pytest.approx(weight * TEXT_CE)
    assert loss_of(batch, {term: 12}) == pytest.approx(weight * TEXT_CE / 4), "rows elsewhere in the step count too"


def test_pad_rows_join_the_audio_text_mean_with_a_tenth() -> None:
    batch = batch_of([LossKind.AUDIO_TEXT, LossKind.PAD_TEXT, LossKind.PAD_TEXT])
    assert loss_of(batch, {"audio_text": 1, "pad_text": 2}) == pytest.approx(1.5 * TEXT_CE)
    alone = batch_of([LossKind.PAD_TEXT])
    assert loss_of(alone, {"audio_text": 1, "pad_text": 2}) == pytest.approx(1.5 * 0.1 * TEXT_CE / 1.2)


def test_audio_is_the_mean_over_heads_and_head_0_counts_more() -> None:
    batch = batch_of([LossKind.NONE] * 5, audio_rows=5)
    counts = {"audio_0": 5, "audio_1": 4, "audio_2": 4, "audio_3": 4}
    assert loss_of(batch, counts) == pytest.approx(0.25 * AUDIO_CE + 0.1 * AUDIO_CE)


def test_sums_are_means_times_counts() -> None:
    batch = batch_of([LossKind.TEXT] * 4, audio_rows=2)
    counts = {"text": 4, "audio_0": 2, "audio_1": 1, "audio_2": 1, "audio_3": 1}
    _, sums = objective(Uniform(), torch.zeros(4, 3), batch, term_scales(WEIGHTS, counts))
    found = means(sums, counts)
    assert found == pytest.approx({"text": TEXT_CE, **{f"audio_{c}": AUDIO_CE for c in range(4)}})
    assert len(sums) == len(TERMS)


def test_empty_micro_batch_has_no_loss() -> None:
    assert loss_of(batch_of([LossKind.NONE, LossKind.NONE]), {"text": 9}) == 0.0
