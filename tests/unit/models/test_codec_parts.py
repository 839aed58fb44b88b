"""The codec's networks: published parameter counts and shapes, the quantiser's codes, Snake's gradient, resampling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from omni_ray.config.model import SizeName, model_preset
from omni_ray.models.audio_decoder import AudioDecoder
from omni_ray.models.audio_tokenizer import AcousticEncoder, SemanticEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.codec_blocks import Snake
from omni_ray.models.quantizer import Quantizer
from omni_ray.models.resample import Resampler, resample
from omni_ray.types.errors import ConfigError, RequestError


def millions(module: nn.Module) -> float:
    return sum(weight.numel() for weight in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("size", "semantic", "acoustic", "decoder_16k", "decoder_24k", "table"),
    [
        ("small", 39.1, 5.5, 32.8, 30.0, 4.2),
        ("flash-omni", 514.7, 21.9, 151.9, 140.3, 10.5),
    ],
)
def test_parameter_counts(
    size: SizeName, semantic: float, acoustic: float, decoder_16k: float, decoder_24k: float, table: float
) -> None:
    config = model_preset(size).codec
    with torch.device("meta"):
        assert round(millions(SemanticEncoder(config)), 1) == semantic
        assert round(millions(AcousticEncoder(config)), 1) == acoustic
        for rate_hz, count in ((16000, decoder_16k), (24000, decoder_24k)):
            decoder = AudioDecoder(config, rate_hz)
            assert round(millions(decoder) - millions(decoder.semantic), 1) == count
        assert round(millions(decoder.semantic), 1) == table


def test_tiny_codec_is_small() -> None:
    with torch.device("meta"):
        assert millions(Codec(model_preset("tiny").codec)) <= 3.0


@pytest.mark.parametrize(("rate_hz", "samples"), [(16000, 9600), (24000, 14400)])
def test_ten_frames_make_600_ms(rate_hz: int, samples: int) -> None:
    decoder = AudioDecoder(model_preset("tiny").codec, rate_hz)
    wave = decoder(torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 64, 10))
    assert wave.shape == (1, 1, samples)


def test_an_unknown_output_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="codec output rate is 48000 Hz; choose 16000 or 24000"):
        AudioDecoder(model_preset("tiny").codec, 48000)


@pytest.mark.parametrize("frames", [1, 2, 7, 30])
def test_both_branches_give_one_row_a_frame(frames: int) -> None:
    torch.manual_seed(0)
    codec = Codec(model_preset("tiny").codec).eval()
    semantic_BN, acoustic_BNL = codec.tokens(torch.randn(2, 960 * frames) * 0.1)
    assert semantic_BN.shape == (2, frames)
    assert acoustic_BNL.shape == (2, frames, 3)


def test_semantic_frames_of_a_padded_clip_do_not_see_the_padding() -> None:
    torch.manual_seed(0)
    codec = Codec(model_preset("tiny").codec).eval()
    short_FC, frames = torch.randn(6 * 5 - 2, 80), 5
    padded_FC = torch.nn.functional.pad(short_FC, (0, 0, 0, 18), value=4.0)
    keep_BN = torch.arange(8).unsqueeze(0) < frames
    with torch.no_grad():
        alone = codec.semantic(short_FC.unsqueeze(0))
        padded = codec.semantic(padded_FC.unsqueeze(0), keep_BN)[:, :frames]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group_codes", [10, 90])
def test_every_joint_code_of_every_level_comes_back(group_codes: int) -> None:
    """Codes -> latents -> codes, level by level: all 100 x 3 of tiny, all 8,100 x 3 of the published size."""
    torch.manual_seed(0)
    quantizer = Quantizer(latent_dim=64, levels=3, group_codes=group_codes, group_dim=8).double()
    # With orthonormal projections, in = transpose of out, a level recovers exactly what it said.
    codes_N = torch.arange(group_codes**2).unsqueeze(0)
    levels: Iterable[Any] = quantizer.levels
    for level in levels:
        orthonormal_(level)
        with torch.no_grad():
            said = level.read(codes_N)
            _, heard, _, _ = level(said)
        assert torch.equal(heard, codes_N)


@torch.no_grad()
def orthonormal_(level: Any) -> None:
    for group in range(2):
        out = level.project_out[group]
        first = 32 * group
        weight_HP = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64))[0]
        out.weight = weight_HP.unsqueeze(-1)
        out.bias.zero_()
        into = level.project_in[group]
        weight_PZ = torch.zeros(8, 64, dtype=torch.float64)
        weight_PZ[:, first : first + 32] = weight_HP.t()
        into.weight = weight_PZ.unsqueeze(-1)
        into.bias.zero_()


def test_levels_refine_and_read_agrees_with_forward() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(latent_dim=16, levels=3, group_codes=10, group_dim=8)
    latents_BZT = torch.randn(2, 16, 9)
    made = quantizer(latents_BZT)
    torch.testing.assert_close(quantizer.read(made.codes_BTL), made.values_BZT, atol=1e-5, rtol=1e-5)
    one = quantizer(latents_BZT, torch.tensor([1, 3]))
    torch.testing.assert_close(quantizer.read(made.codes_BTL[..., :1])[0], one.values_BZT[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.values_BZT[1], made.values_BZT[1])
    with pytest.raises(RequestError, match="4 acoustic codebooks given; this codec decodes 1 to 3"):
        quantizer.read(torch.zeros(1, 2, 4, dtype=torch.long))


def test_gradients_pass_straight_through_the_quantiser() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(latent_dim=16, levels=2, group_codes=10, group_dim=8)
    latents_BZT = torch.randn(1, 16, 5, requires_grad=True)
    made = quantizer(latents_BZT)
    made.values_BZT.square().sum().backward()
    assert latents_BZT.grad is not None
    assert latents_BZT.grad.abs().sum() > 0


def test_snake_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    snake = Snake(3).double()
    with torch.no_grad():
        snake.alpha.uniform_(0.3, 2.0)
    x_BCT = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = x_BCT + torch.sin(snake.alpha * x_BCT) ** 2 / (snake.alpha + 1e-9)
    torch.testing.assert_close(snake(x_BCT), expected)
    wanted = torch.autograd.grad(expected.sin().sum(), [x_BCT, snake.alpha])
    got = torch.autograd.grad(snake(x_BCT).sin().sum(), [x_BCT, snake.alpha])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(24000, 16000), (8000, 16000), (22050, 24000), (44101, 16000), (96000, 16000)]
)
def test_resampling_keeps_a_tone_and_its_length(from_hz: int, to_hz: int) -> None:
    tone_S = torch.sin(2 * math.pi * 440 * torch.arange(from_hz // 4) / from_hz)
    made_S = resample(tone_S, from_hz, to_hz)
    assert len(made_S) == math.ceil(len(tone_S) * to_hz / from_hz)
    wanted_S = torch.sin(2 * math.pi * 440 * torch.arange(len(made_S)) / to_hz)
    assert (made_S - wanted_S)[200:-200].abs().max() < 1e-3


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    tone_S = torch.sin(2 * math.pi * 11000 * torch.arange(24000) / 24000)
    assert resample(tone_S, 24000, 16000)[200:-200].abs().max() < 2e-2


@pytest.mark.parametrize(("rate", "wanted"), [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 24000)])
@pytest.mark.parametrize("samples", [1, 90, 30001], ids="{}-samples".format)
def test_resampling_in_pieces_equals_the_whole(rate: int, wanted: int, samples: int) -> None:
    chance = torch.Generator().manual_seed(samples)
    wave = torch.randn(samples, generator=chance)
    whole, resampler, pieces, first = resample(wave, rate, wanted), Resampler(rate, wanted), [], 0
    while first < samples:
        size = int(torch.randint(1, 3000, (), generator=chance))
        pieces.append(resampler.push(wave[first : first + size]))
        first += size
    pieces.append(resampler.flush())
    assert torch.equal(torch.cat(pieces), whole)
    assert len(whole) == -(-samples * wanted // rate)
