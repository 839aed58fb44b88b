"""The start of the acoustic encoder, and a quantiser set from data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omni_ray.config.model import model_preset
from omni_ray.models.audio_tokenizer import AcousticEncoder
from omni_ray.models.codec_blocks import BRANCH_GAIN, ResidualUnit
from omni_ray.models.quantizer import Quantizer
from pipelines.components.codec_latents import cosine_kmeans, fit_quantizer, unit_start


def quiet_sound(clips: int) -> torch.Tensor:
    """Noise through a slow filter near the level of speech, [B, 1, S]."""
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn(clips, 1, 960 * 8 + 30, generator=chance)
    return 0.05 * F.avg_pool1d(noise, 31, stride=1)


def test_every_convolution_starts_at_unit_scale() -> None:
    torch.manual_seed(0)
    encoder, sound = AcousticEncoder(model_preset("tiny").codec), quiet_sound(16)
    unit_start(encoder, sound)
    branches = {id(unit.point) for unit in encoder.modules() if isinstance(unit, ResidualUnit)}
    seen = []

    def look(conv: Any, _: Any, out: torch.Tensor) -> None:
        wanted = BRANCH_GAIN if id(conv) in branches else 1.0
        torch.testing.assert_close(out.std(dim=(0, 2)), torch.full((out.shape[1],), wanted), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(out.mean(dim=(0, 2)), torch.zeros(out.shape[1]), atol=1e-3, rtol=0)
        seen.append(conv)

    for module in encoder.modules():
        if isinstance(module, nn.Conv1d):
            module.register_forward_hook(look)
    encoder(sound)
    assert len(seen) == 1 + 4 * (3 * 2 + 1) + 1


def test_each_level_leaves_less_and_reads_back_what_it_coded() -> None:
    chance = torch.Generator().manual_seed(1)
    # Latents with a few strong directions, as an encoder's are.
    latents_BZN = torch.einsum(
        "zk,bkn->bzn", torch.randn(64, 6, generator=chance), torch.randn(24, 6, 20, generator=chance)
    )
    latents_BZN = latents_BZN + 3.0 + 0.1 * torch.randn(24, 64, 20, generator=chance)
    quantizer = Quantizer(64, 3, 10, 8)
    shares = fit_quantizer(quantizer, latents_BZN, chance)
    assert 1.0 > shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.4
    with torch.no_grad():
        made = quantizer(latents_BZN)
        assert len(made.codes_BTL[..., 0].unique()) > 50, "most joint codes are used"
        torch.testing.assert_close(quantizer.read(made.codes_BTL), made.values_BZT, atol=1e-4, rtol=1e-4)
        left = (latents_BZN - made.values_BZT).square().mean() / latents_BZN.var()
    assert float(left) == pytest.approx(shares[2], rel=0.2)


def test_kmeans_by_cosine_finds_directions_whatever_the_length() -> None:
    chance = torch.Generator().manual_seed(2)
    axes = torch.eye(8)[:4]
    rows = axes.repeat_interleave(50, dim=0) * (0.5 + 2.0 * torch.rand(200, 1, generator=chance))
    centres = cosine_kmeans(rows + 0.01 * torch.randn(200, 8, generator=chance), 4, chance)
    cosine = F.normalize(centres, dim=1) @ axes.t()
    assert sorted(cosine.argmax(dim=1).tolist()) == [0, 1, 2, 3]
    assert float(cosine.max(dim=1).values.min()) > 0.99
    assert 1.2 < float(centres.norm(dim=1).mean()) < 1.8, "a centre keeps the rows' mean length"
