"""Pictures, sound and video from bytes to rows, and bytes that are none."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni_ray.config.model import VisionConfig, model_preset
from omni_ray.data import audio, image, video
from omni_ray.types.errors import MediaError

TINY = model_preset("tiny")
VISION = TINY.vision


def _png(mode: str = "RGB", size: tuple[int, int] = (56, 56), **save: object) -> bytes:
    out = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode) if len(mode) > 1 else 1))
    Image.fromarray(values.squeeze().astype(np.uint8), mode=None).save(out, format="PNG", **save)
    return out.getvalue()


def _wav(samples: int, rate: int, channels: int = 1, form: str = "WAV") -> bytes:
    wave = 0.5 * np.sin(np.arange(samples) * 2 * np.pi * 440 / rate).astype(np.float32)
    out = io.BytesIO()
    soundfile.write(out, np.repeat(wave[:, None], channels, axis=1), rate, format=form)
    return out.getvalue()


def _clip(frames: int, fps: int = 4, side: int = 56, sound: np.ndarray | None = None) -> bytes:
    pixels = np.stack([np.full((side, side, 3), 20 * i % 250, dtype=np.uint8) for i in range(frames)])
    return video.encode_mp4(pixels, fps, sound)


def test_patch_rows_equal_a_convolution() -> None:
    raw = _png(size=(84, 56))
    patches = image.image_patches(raw, "a.png", VISION)
    assert patches.grid == (1, 4, 6) == image.image_grid(raw, "a.png", VISION)
    assert patches.values_PC.shape == (24, VISION.patch_values)
    pixels = (image.decode_image(raw, "a.png").astype(np.float32) / np.float32(255) - image.MEAN) / image.STD
    frames = torch.from_numpy(np.stack([pixels, pixels])).permute(3, 0, 1, 2)[None]
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(3, 5, (2, 14, 14), stride=(2, 14, 14))
    with torch.no_grad():
        wanted = conv(frames).flatten(2)[0].T
        rows = torch.nn.functional.linear(torch.from_numpy(patches.values_PC), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((56, 56), (56, 56)),
        ((60, 100), (56, 112)),
        ((8, 8), (56, 56)),
        ((28, 28), (56, 56)),
        ((1000, 1000), (224, 224)),
        ((1080, 1920), (168, 280)),
        ((1, 5000), (28, 1792)),
        ((5000, 1), (1792, 28)),
    ],
)
def test_native_resolution(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert image.fit_size(*size, VISION) == wanted


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_of_no_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match="has nothing to see; both sides need a pixel at least"):
        image.fit_size(*size, VISION)


@pytest.mark.parametrize("config", [VISION, model_preset("flash-omni").vision], ids=["tiny", "flash-omni"])
def test_every_size_keeps_the_limits(config: VisionConfig) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        h, w = (int(v) for v in np.exp(rng.uniform(0, 9, size=2)) + 1)
        rows, columns = (side // config.patch_size for side in image.fit_size(h, w, config))
        assert rows * columns <= config.max_patches
        assert rows * columns >= config.min_patches
        assert rows % (config.side_multiple // config.patch_size) == columns % config.merge[1] == 0


def test_transparency_turns_white_and_turned_photos_stand_upright() -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (30, 30), (255, 0, 0, 0)).save(clear, format="PNG")
    assert (image.decode_image(clear.getvalue(), "a") == 255).all()
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(turned, format="JPEG", exif=exif)
    assert image.image_size(turned.getvalue(), "a") == (40, 20) == image.decode_image(turned.getvalue(), "a").shape[:2]
    deep = io.BytesIO()
    Image.fromarray(np.full((9, 9), 65535, dtype=np.uint16)).save(deep, format="PNG")
    assert (image.decode_image(deep.getvalue(), "a") == 255).all()


def test_a_large_picture_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_PIXELS", 3000)
    with pytest.raises(MediaError, match=r"big.png has 56 x 56 pixels, more than 3000"):
        image.decode_image(_png(), "big.png")


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_sound_of_every_format_becomes_mono_at_16_khz(form: str) -> None:
    raw = _wav(22050, 44100, channels=2, form=form)
    wave = audio.decode_audio(raw, "a")
    assert (wave.dtype, wave.ndim) == (np.float32, 1)
    assert len(wave) == audio.count_samples(raw, "a")
    if form != "MP3":
        assert len(wave) == 8000
    middle = wave[2000:6000]
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, rel=0.05)
    assert np.abs(np.fft.rfft(middle)).argmax() == round(440 * len(middle) / 16000)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 48000])
def test_the_header_tells_the_length(rate: int) -> None:
    for samples in (401, 4000, 9999):
        raw = _wav(samples, rate)
        assert audio.count_samples(raw, "a") == len(audio.decode_audio(raw, "a")) == math.ceil(samples * 16000 / rate)


def test_rows_of_sound() -> None:
    # networks.md: T = floor((S - 400) / 160) + 1, rows ceil(T / 8); codec frames ceil(S / 960)
    assert [audio.audio_rows(s, TINY.audio) for s in (400, 559, 1519, 1520, 1680, 16000)] == [1, 1, 1, 1, 2, 13]
    assert [audio.codec_frames(s, TINY.codec) for s in (1, 960, 961, 16000)] == [1, 1, 2, 17]
    with pytest.raises(MediaError, match="399 samples is shorter than one frame of 400"):
        audio.audio_rows(399, TINY.audio)
    with pytest.raises(MediaError, match=r"31.00 s cannot be coded"):
        audio.codec_frames(31 * 16000, TINY.codec)


def test_the_sound_track_of_a_clip_is_heard() -> None:
    tone = 0.5 * np.sin(np.arange(32000) * 2 * np.pi * 440 / 16000).astype(np.float32)
    raw = _clip(8, sound=tone)
    wave = audio.decode_audio(raw, "clip.mp4")
    assert abs(len(wave) - 32000) < 3000
    assert len(wave) == audio.count_samples(raw, "clip.mp4")
    assert np.abs(np.fft.rfft(wave[8000:24000])).argmax() == 440
    with pytest.raises(MediaError, match=r"silent.mp4 has no sound track"):
        audio.decode_audio(_clip(8), "silent.mp4")


def test_odd_sound_is_refused() -> None:
    for raw, why in (
        (_wav(0, 16000), "a.wav holds no samples"),
        (_wav(121 * 4000, 4000), "a.wav lasts 121.0 s, more than 120 s"),
        (_wav(100, 2000), "a.wav has 2000 samples a second"),
        (_wav(5000, 44101), "a.wav has 44101 samples a second, too odd a rate"),
    ):
        with pytest.raises(MediaError, match=why):
            audio.decode_audio(raw, "a.wav")
    out = io.BytesIO()
    soundfile.write(out, np.array([0.0, np.nan] * 500), 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(MediaError, match=r"a.wav has samples that are not finite"):
        audio.decode_audio(out.getvalue(), "a.wav")


@pytest.mark.parametrize("frames", [1, 7, 8, 16])
def test_short_clips_are_looked_at_whole(frames: int) -> None:
    raw = _clip(frames)
    plan = video.plan_video(raw, "clip.mp4", VISION)
    pairs = math.ceil(frames / 2)
    assert plan.frames == tuple(range(frames))
    assert plan.times_s == pytest.approx([i * 0.5 for i in range(pairs)])
    patches = video.video_patches(raw, "clip.mp4", VISION)
    assert patches.grid == plan.grid == (pairs, 4, 4)
    assert patches.values_PC.shape == (pairs * 16, VISION.patch_values)


def test_frame_pairs_hold_their_frames_in_order() -> None:
    patches = video.video_patches(_clip(4), "clip.mp4", VISION)
    values = patches.values_PC.reshape(2, 16, 3, 2, 14 * 14).mean(axis=(1, 4))
    brightness = (values * image.STD[:, None] + image.MEAN[:, None]).mean(axis=1).reshape(-1) * 255
    np.testing.assert_allclose(brightness, [0, 20, 40, 60], atol=4)


def test_longer_films_are_sampled_at_segment_middles() -> None:
    assert video.choose_frames(300, 30.0, 128) == tuple(math.floor((i + 0.5) * 300 / 20) for i in range(20))
    assert len(video.choose_frames(150, 30.0, 128)) == 16, "5 s: the rate rises to give 16"
    assert len(video.choose_frames(90, 30.0, 128)) == 12, "3 s: at most 4 frames a second"
    assert len(video.choose_frames(30 * 600, 30.0, 128)) == 128
    assert video.choose_frames(5, 30.0, 128) == (0, 1, 2, 3, 4)
    assert len(video.choose_frames(400, 4.0, 16)) == 16


def test_a_sampled_film_shares_its_patches() -> None:
    plan = video.plan_video(_clip(40, fps=8, side=224), "film.mp4", VISION)
    assert plan.grid == (8, 4, 4), "256 patches over 8 pairs leave 32, floored to 56 x 56"
    assert len(plan.frames) == 16


@pytest.mark.parametrize(
    "read",
    [
        lambda raw: image.decode_image(raw, "odd"),
        lambda raw: image.image_size(raw, "odd"),
        lambda raw: audio.decode_audio(raw, "odd"),
        lambda raw: audio.count_samples(raw, "odd"),
        lambda raw: video.plan_video(raw, "odd", VISION),
        lambda raw: video.video_patches(raw, "odd", VISION),
    ],
    ids=["decode_image", "image_size", "decode_audio", "count_samples", "plan_video", "video_patches"],
)
@pytest.mark.parametrize("raw", [b"", b"\x00" * 64, b"plain words, no media at all"], ids=["empty", "zeros", "words"])
def test_bytes_that_are_no_media_are_refused_by_name(read: Callable[[bytes], object], raw: bytes) -> None:
    with pytest.raises(MediaError, match=r"^odd "):
        read(raw)


def test_media_cut_short_is_refused_by_name() -> None:
    png = _png()
    with pytest.raises(MediaError, match=r"^cut.png cannot be decoded"):
        image.decode_image(png[: len(png) // 2], "cut.png")
    clip = _clip(8)
    with pytest.raises(MediaError, match=r"^cut.mp4 "):
        video.video_patches(clip[: len(clip) // 2], "cut.mp4", VISION)


def test_a_jpeg_has_the_pixels_that_pil_gives() -> None:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    smooth = small.resize((300, 200))
    saves: list[dict[str, object]] = [{"quality": 60}, {"quality": 95, "subsampling": 0}, {"progressive": True}]
    for save in saves:
        out = io.BytesIO()
        smooth.save(out, format="JPEG", **save)
        with Image.open(io.BytesIO(out.getvalue())) as wanted:
            assert np.array_equal(image.decode_image(out.getvalue(), "a"), np.asarray(wanted.convert("RGB")))
    grey, cmyk = io.BytesIO(), io.BytesIO()
    smooth.convert("L").save(grey, format="JPEG")
    smooth.convert("CMYK").save(cmyk, format="JPEG")
    assert all(image.decode_image(raw.getvalue(), "a").shape == (200, 300, 3) for raw in (grey, cmyk))


@pytest.mark.parametrize("size", [(512, 512), (301, 217), (1080, 1920)])
def test_resizing_is_pils_but_for_rounding(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((112, 224), Image.Resampling.BICUBIC)).astype(int)
    planar = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
    for given in (pixels, planar):
        sized = image.resize(given, (224, 112))
        assert (sized.shape, sized.dtype) == ((224, 112, 3), np.uint8)
        assert np.abs(sized.astype(int) - wanted).max() <= 1
