"""Sound files of any form through the codec, and the ones that are refused."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from omni_ray.config.model import model_preset
from omni_ray.models.codec import Codec
from omni_ray.types.errors import CheckpointError, DataError, MediaError, RequestError
from pipelines import codec_files
from pipelines.codec_files import decode_file, encode_file, reconstruct_file

SECONDS = 0.6
FRAMES = 10


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, of the tiny size."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    Codec(model_preset("tiny").codec).save_pretrained(folder)
    return folder


def tone(rate: int, channels: int = 1, scale: float = 0.3) -> np.ndarray:
    time_s = np.arange(round(SECONDS * rate)) / rate
    one = (scale * np.sin(2 * np.pi * 220 * time_s)).astype(np.float32)
    return np.repeat(one[:, None], channels, axis=1)


@pytest.mark.parametrize(
    ("name", "rate", "channels", "form"),
    [
        ("8-bit.wav", 8000, 1, {"subtype": "PCM_U8"}),
        ("studio.wav", 96_000, 1, {"subtype": "PCM_24"}),
        ("surround.wav", 48_000, 6, {"subtype": "PCM_16"}),
        ("stereo.flac", 44_100, 2, {}),
        ("stereo.ogg", 44_100, 2, {}),
        ("mono.mp3", 44_100, 1, {}),
        ("float.wav", 16_000, 1, {"subtype": "FLOAT"}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_any_rate_channel_count_and_format_is_coded(
    codec: Path, tmp_path: Path, name: str, rate: int, channels: int, form: dict[str, str]
) -> None:
    source, codes, out = tmp_path / name, tmp_path / "codes.npz", tmp_path / "out.flac"
    soundfile.write(source, tone(rate, channels), rate, **form)
    told = encode_file(source, codes, codec=codec)
    # mp3 and ogg coders add a little silence around a sound.
    assert FRAMES <= told["frames"] <= FRAMES + 2
    decoded = decode_file(codes, out, codec=codec)
    assert decoded["frames"] == told["frames"]
    assert soundfile.info(out).frames == told["frames"] * 1440
    again = reconstruct_file(source, tmp_path / "again.flac", codec=codec)
    assert again["frames"] == told["frames"]
    assert (tmp_path / "again.flac").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(1, np.float32),
        np.zeros(9600, np.float32),
        np.full(9600, 1.0, np.float32),
        tone(16_000, scale=4.0)[:, 0],
    ],
    ids=["one-sample", "silent", "clipped", "beyond-full-scale"],
)
def test_short_silent_and_clipped_sounds_give_finite_sound(codec: Path, tmp_path: Path, samples: np.ndarray) -> None:
    source, out = tmp_path / "in.wav", tmp_path / "out.wav"
    soundfile.write(source, samples, 16_000, subtype="FLOAT")
    told = reconstruct_file(source, out, codec=codec)
    assert told["frames"] == max(1, -(-len(samples) // 960))
    made, _ = soundfile.read(out)
    assert np.isfinite(made).all()
    assert np.abs(made).max() <= 1.0


def test_what_cannot_be_coded_is_refused_in_one_sentence(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(content: bytes, why: str) -> None:
        source = tmp_path / "in.wav"
        source.write_bytes(content)
        with pytest.raises(MediaError, match=why):
            encode_file(source, tmp_path / "codes.npz", codec=codec)
        assert not (tmp_path / "codes.npz").exists(), "nothing half-written"

    def wav(samples: np.ndarray, subtype: str = "FLOAT") -> bytes:
        out = io.BytesIO()
        soundfile.write(out, samples, 16_000, format="WAV", subtype=subtype)
        return out.getvalue()

    refused(b"", "in.wav cannot be decoded as sound")
    refused(wav(np.zeros(0, np.float32)), "in.wav holds no samples; record it again")
    refused(wav(np.array([0.1, np.nan, 0.2], np.float32)), "in.wav has samples that are not finite")
    refused(wav(tone(16_000)[:, 0], "PCM_16")[:-2000], "in.wav is cut short: .* of .* bytes")
    monkeypatch.setattr(codec_files, "LONGEST_S", 0.5)
    refused(wav(tone(16_000)[:, 0]), r"in.wav lasts 0.6 s, more than 0.5 s; cut it into pieces")


def test_a_file_that_ends_in_the_middle_is_refused(codec: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000 * 25).astype(np.float32)
    for name in ("cut.flac", "cut.ogg", "cut.mp3"):
        whole, cut = tmp_path / f"whole-{name}", tmp_path / name
        soundfile.write(whole, noise, 16_000)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
        out = tmp_path / "codes.npz"
        if name == "cut.ogg":  # it promises no length: what is there is taken, as players do
            assert 10 < encode_file(cut, out, codec=codec)["seconds"] < 20
            out.unlink()
            continue
        with pytest.raises(MediaError, match=rf"{name} (is cut short|is damaged|cannot be decoded)"):
            encode_file(cut, out, codec=codec)
        assert not out.exists()


def test_a_value_that_is_not_finite_far_into_a_file_is_found(codec: Path, tmp_path: Path) -> None:
    samples = np.zeros(16_000 * 12, np.float32)
    samples[-5] = np.inf
    soundfile.write(tmp_path / "late.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"late\.wav has samples that are not finite"):
        reconstruct_file(tmp_path / "late.wav", tmp_path / "out.wav", codec=codec)
    assert not list(tmp_path.glob("*out.wav*")), "nothing half-written"


def test_a_folder_and_a_missing_file_are_refused(codec: Path, tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere.wav"):
        with pytest.raises(MediaError, match="cannot be read"):
            encode_file(source, tmp_path / "codes.npz", codec=codec)


def test_codes_that_are_no_codes_are_refused(codec: Path, tmp_path: Path) -> None:
    source, codes = tmp_path / "in.wav", tmp_path / "codes.npz"
    soundfile.write(source, tone(16_000), 16_000)
    encode_file(source, codes, codec=codec)
    good = dict(np.load(codes))
    for wrong, why in (
        (good["codes"] * -1 - 1, "is out of range"),
        (good["codes"][:, :1], r"codes have shape \[10, 1\]"),
    ):
        np.savez(codes, codes=wrong, codec=good["codec"])
        with pytest.raises(RequestError, match=why):
            decode_file(codes, tmp_path / "out.wav", codec=codec)
    np.savez(codes, codes=good["codes"][:0], codec=good["codec"])
    assert decode_file(codes, tmp_path / "out.wav", codec=codec)["frames"] == 0
    for wrong in (good["codes"].astype(np.float32) + 0.5, good["codes"].ravel()):
        np.savez(codes, codes=wrong, codec=good["codec"])
        with pytest.raises(DataError, match="is no file of codec ids"):
            decode_file(codes, tmp_path / "out.wav", codec=codec)


def test_a_recording_longer_than_a_segment_is_cut_and_joined(codec: Path, tmp_path: Path) -> None:
    source = tmp_path / "long.wav"
    with wave.open(str(source), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        noise = np.random.default_rng(0).normal(0, 3000, 8000 * 130).astype(np.int16)
        out.writeframes(noise.tobytes())
    told = encode_file(source, tmp_path / "codes.npz", codec=codec)
    assert told["frames"] == -(-130 * 16_000 // 960), "longer than one item of a conversation may be"


def test_codes_that_are_out_of_range_or_of_another_codec_are_refused(codec: Path, tmp_path: Path) -> None:
    source, codes = tmp_path / "in.wav", tmp_path / "codes.npz"
    soundfile.write(source, tone(16_000), 16_000)
    encode_file(source, codes, codec=codec)
    stored = dict(np.load(codes))
    stored["codes"][3, 2] = 100
    np.savez(codes, **stored)
    with pytest.raises(RequestError, match=r"code 100 at frame 3, codebook 2 is out of range.*has 0\.\.99"):
        decode_file(codes, tmp_path / "out.wav", codec=codec)
    with pytest.raises(DataError, match="is no file of codec ids"):
        decode_file(source, tmp_path / "out.wav", codec=codec)
    other = tmp_path / "wider"
    config = model_preset("tiny").codec.model_copy(update={"decoder_dim": 160})
    Codec(config).save_pretrained(other)
    (other / "config.json").write_bytes((codec / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="weights and settings are from different models"):
        reconstruct_file(source, tmp_path / "out.wav", codec=other)
