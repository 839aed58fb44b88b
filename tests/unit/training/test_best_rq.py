"""BEST-RQ: frozen targets, stretches that are hidden, and a loss over them alone."""

from __future__ import annotations

import pytest
import torch

from omni_ray.config.speech_training import BestRqConfig
from omni_ray.training.best_rq import RandomTargets, hide, mask_frames, masked_loss

CONFIG = BestRqConfig(codes=32, width=16, mask_share=0.1, mask_s=0.24)


def test_targets_are_frozen_and_hang_on_the_seed_alone() -> None:
    one, same, other = (RandomTargets(80, CONFIG, seed=seed) for seed in (1, 1, 2))
    rows = torch.randn(3, 6 * 20 - 2, 80)
    assert not list(one.parameters())
    assert torch.equal(one(rows), same(rows))
    assert not torch.equal(one(rows), other(rows))
    assert one(rows).shape == (3, 20)
    assert len(one(rows).unique()) > 16, "most codes occur on noise"


def test_stretches_have_their_length_and_stay_in_the_clip() -> None:
    keep = torch.arange(400) < torch.tensor([[400], [150]])
    hidden = mask_frames(keep, CONFIG, torch.Generator().manual_seed(0))
    assert not hidden[1, 150:].any()
    # Four frames from every start, and a tenth of frames are starts: 1 - 0.9^4 = 0.34 are hidden.
    assert float(hidden[0].float().mean()) == pytest.approx(0.34, abs=0.08)
    text = "".join("#" if frame else "." for frame in hidden[0].tolist())
    assert min(len(run) for run in text[: text.rindex(".")].split(".") if run) >= 4


def test_only_hidden_frames_become_noise() -> None:
    rows, hidden = torch.randn(1, 6 * 5 - 2, 8), torch.tensor([[False, True, False, False, True]])
    mean, scale = torch.full((8,), 3.0), torch.full((8,), 2.0)
    noisy = hide(rows, hidden, mean, scale, torch.Generator().manual_seed(0))
    changed = (noisy != rows).any(dim=-1)[0]
    assert changed.tolist() == [False] * 6 + [True] * 6 + [False] * 12 + [True] * 4
    assert float(((noisy[0, 6:12] - mean) * scale).std()) == pytest.approx(0.1, abs=0.05)


def test_parts_of_the_loss_add_up_to_the_whole_batch() -> None:
    chance = torch.Generator().manual_seed(0)
    logits, codes = torch.randn(4, 9, 32, generator=chance), torch.randint(0, 32, (4, 9), generator=chance)
    hidden = torch.rand(4, 9, generator=chance) < 0.4
    whole = masked_loss(logits, codes, hidden, int(hidden.sum()))
    parts = [masked_loss(logits[i], codes[i], hidden[i], int(hidden.sum())) for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    assert float(masked_loss(logits, codes, hidden & False, 0)) == 0.0
