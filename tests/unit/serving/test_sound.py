"""Sound on the wire: any cut gives the same samples; rates and g711 as the standards say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_ray.models.resample import resample
from pipelines.serving.sound import Format, Resampler, SoundReader, SoundWriter, decode, encode

RATES = [(24000, 16000), (8000, 16000), (24000, 8000), (48000, 16000), (16000, 16000), (44100, 16000)]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.8, 0.8, samples).astype(np.float32)


def cut(raw: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start, turn = [], 0, 0
    while start < len(raw):
        size = max(1, sizes[turn % len(sizes)])
        pieces.append(raw[start : start + size])
        start, turn = start + size, turn + 1
    return pieces


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_a_running_signal_is_the_whole_one(from_hz: int, to_hz: int) -> None:
    wave = noise(3001)
    stream = Resampler(from_hz, to_hz)
    out = np.concatenate([stream.push(wave), stream.flush()])
    expected = resample(torch.from_numpy(wave), from_hz, to_hz).numpy()
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() < 2e-6


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES[:3])
def test_an_output_waits_for_its_kernel_only(from_hz: int, to_hz: int) -> None:
    stream = Resampler(from_hz, to_hz)
    held = 2400 * to_hz / from_hz - len(stream.push(noise(2400)))
    assert held / to_hz < 0.0025


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 999), min_size=1, max_size=8),
    form=st.sampled_from(
        [Format(), Format("audio/pcm", 16000), Format("audio/pcmu", 8000), Format("audio/pcma", 8000)]
    ),
    length=st.integers(0, 4001),
)
def test_bytes_cut_anywhere_give_the_same_samples(sizes: list[int], form: Format, length: int) -> None:
    raw = np.random.default_rng(length).integers(0, 256, length, np.uint8).tobytes()
    whole, parts = SoundReader(form), SoundReader(form)
    expected = np.concatenate([whole.push(raw), whole.flush()])
    got = np.concatenate([*[parts.push(piece) for piece in cut(raw, sizes)], parts.flush()])
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("form", [Format(), Format("audio/pcm", 16000), Format("audio/pcmu", 8000)], ids=str)
def test_said_in_pieces_equals_said_at_once(form: Format) -> None:
    wave = noise(24000)
    whole, parts = SoundWriter(form), SoundWriter(form)
    expected = whole.push(wave) + whole.flush()
    got = b"".join(parts.push(piece) for piece in np.split(wave, [1, 2, 1442, 9000])) + parts.flush()
    assert got == expected
    assert len(got) == form.width * form.rate_hz


def test_g711_agrees_with_the_standard() -> None:
    # Values of ITU-T G.711: the ends of the scale, and the quietest steps.
    assert decode(bytes([0x00, 0x80, 0xFF, 0x7F]), "audio/pcmu").tolist() == [-32124 / 32768, 32124 / 32768, 0, 0]
    assert decode(bytes([0xD5, 0x55, 0xAA, 0x2A]), "audio/pcma").tolist() == [
        8 / 32768,
        -8 / 32768,
        32256 / 32768,
        -32256 / 32768,
    ]
    for kind in ("audio/pcmu", "audio/pcma"):
        every = bytes(range(256))
        again = encode(decode(every, kind) * 32768 / 32767, kind)
        assert np.array_equal(decode(again, kind), decode(every, kind))


def test_too_loud_is_clipped_and_nothing_wraps_round() -> None:
    assert np.frombuffer(encode(np.array([2.0, -2.0, 0.0], np.float32), "audio/pcm"), "<i2").tolist() == [
        32767,
        -32768,
        0,
    ]
