"""The front end against a slow transcription of its equations, and chunked against whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from omni_ray.models.fbank import Fbank, spec_augment
from omni_ray.types.errors import ConfigError, MediaError


@pytest.fixture(scope="module")
def wave() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    t_S = torch.arange(9777) / 16000
    tone_S = 0.3 * torch.sin(2 * math.pi * (200 + 900 * t_S) * t_S)
    return tone_S + 0.02 * torch.randn(9777, generator=generator)


def slow_frame(frame_W: list[float], num_mels: int = 80, low_hz: float = 40.0, high_hz: float = 7800.0) -> list[float]:
    """One frame by the book, in double precision and without any fast transform."""
    size, nfft = 400, 512
    scaled = [32768.0 * v for v in frame_W]
    emphasised = [scaled[i] - 0.97 * scaled[max(i - 1, 0)] for i in range(size)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * i / (size - 1)) for i in range(size)]
    windowed_W = torch.tensor([e * h**0.85 for e, h in zip(emphasised, hann, strict=True)], dtype=torch.float64)
    n_W = torch.arange(size, dtype=torch.float64)
    power = []
    for k in range(nfft // 2 + 1):
        angle_W = 2 * math.pi * k * n_W / nfft
        power.append(float((windowed_W * angle_W.cos()).sum() ** 2 + (windowed_W * angle_W.sin()).sum() ** 2))

    def mel(f: float) -> float:
        return 1127.0 * math.log(1 + f / 700.0)

    step = (mel(high_hz) - mel(low_hz)) / (num_mels + 1)
    out = []
    for m in range(num_mels):
        left, centre, right = (mel(low_hz) + (m + j) * step for j in range(3))
        energy = 0.0
        for k, p in enumerate(power):
            at = mel(k * 16000 / nfft)
            if left < at <= centre:
                energy += p * (at - left) / (centre - left)
            elif centre < at < right:
                energy += p * (right - at) / (right - centre)
        out.append(math.log(max(energy, 1.1920929e-07)))
    return out


@pytest.mark.parametrize("frame", [0, 7, 58])
def test_equals_the_slow_transcription(wave: Tensor, frame: int) -> None:
    features_TM = Fbank()(wave)
    assert features_TM.shape == ((9777 - 400) // 160 + 1, 80)
    expected = torch.tensor(slow_frame(wave[frame * 160 : frame * 160 + 400].tolist()))
    torch.testing.assert_close(features_TM[frame], expected, rtol=1e-4, atol=1e-3)


def test_narrow_band_equals_the_slow_transcription(wave: Tensor) -> None:
    features_TM = Fbank(num_mels=40, low_hz=60, high_hz=3800)(wave)
    expected = torch.tensor(slow_frame(wave[1600:2000].tolist(), 40, 60.0, 3800.0))
    torch.testing.assert_close(features_TM[10], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 37, 160, 400, 512, 1600, 9777], ids="{}-samples".format)
def test_chunked_equals_whole(wave: Tensor, chunk: int) -> None:
    fbank = Fbank()
    parts, state = [], fbank.initial_state(batch_size=1)
    for piece_S in wave[: 2000 if chunk == 1 else None].split(chunk):
        part_BTM, state = fbank.stream(piece_S[None], state)
        assert state.tail_BS.shape[-1] < 400
        parts.append(part_BTM[0])
    assert torch.equal(torch.cat(parts), fbank(wave[:2000] if chunk == 1 else wave))


def test_agrees_with_kaldi_as_torchaudio_has_it(wave: Tensor) -> None:
    from torchaudio.compliance.kaldi import fbank as kaldi_fbank

    expected_TM = kaldi_fbank(
        32768.0 * wave[None],
        num_mel_bins=80,
        low_freq=40.0,
        high_freq=7800.0,
        window_type="povey",
        preemphasis_coefficient=0.97,
        remove_dc_offset=False,
        dither=0.0,
        snip_edges=True,
    )
    torch.testing.assert_close(Fbank()(wave), expected_TM, rtol=1e-4, atol=1e-3)


def test_recordings_side_by_side_equal_each_alone(wave: Tensor) -> None:
    waves = [wave[:n] for n in (400, 9777, 559, 560, 5000)] + [wave.repeat(9)]
    fbank = Fbank()
    for wave_S, features_TM in zip(waves, fbank.many(waves), strict=True):
        assert torch.equal(features_TM, fbank(wave_S))


def test_batch_equals_single(wave: Tensor) -> None:
    fbank = Fbank()
    wave_BS = torch.stack([wave, wave.flip(0), 0.1 * wave])
    assert torch.equal(fbank(wave_BS), torch.stack([fbank(row_S) for row_S in wave_BS]))


def test_silence_is_the_log_floor() -> None:
    assert torch.equal(Fbank()(torch.zeros(800)), torch.full((3, 80), math.log(1.1920929e-07)))


def test_dtype_moves_do_not_touch_it(wave: Tensor) -> None:
    assert torch.equal(Fbank().to(torch.bfloat16)(wave), Fbank()(wave))


def test_too_short_audio_is_refused() -> None:
    with pytest.raises(MediaError) as caught:
        Fbank()(torch.zeros(399))
    assert str(caught.value) == (
        "audio has 399 samples, yet one frame needs 400 (25 ms at 16000 Hz); give a longer recording"
    )


def test_impossible_mel_limits_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Fbank(high_hz=9000)
    assert str(caught.value) == "mel limits are 40 to 9000 Hz at 16000 Hz; choose 0 <= low < high <= 8000"


def test_spec_augment_masks_bands_and_spans_to_the_mean(wave: Tensor) -> None:
    features_TM = Fbank()(wave)
    before_TM = features_TM.clone()
    masked_TM = spec_augment(features_TM, torch.Generator().manual_seed(3), freq_share=0.2, time_share=0.2)
    assert torch.equal(features_TM, before_TM)
    changed_TM = masked_TM != features_TM
    assert changed_TM.any()
    mean_TM = features_TM.mean(dim=0).expand_as(features_TM)
    assert torch.equal(masked_TM[changed_TM], mean_TM[changed_TM])
    whole_rows, whole_columns = changed_TM.all(dim=1), changed_TM.all(dim=0)
    assert whole_rows.sum() <= 2 * int(0.2 * 59)
    assert whole_columns.sum() <= 2 * 16
    assert torch.equal(changed_TM, whole_rows[:, None] | whole_columns[None, :])
