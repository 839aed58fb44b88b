"""Media bytes that are damaged, too large or too long: refused by name, from the header where it tells."""

from __future__ import annotations

import io
import struct
import time
import zlib

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from source_files import picture

from omni_ray.config.model import model_preset
from omni_ray.data import audio, image, video
from omni_ray.types.errors import MediaError

VISION = model_preset("tiny").vision


def _wav(samples: int = 16000, form: str = "WAV") -> bytes:
    out = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(samples) / 7).astype(np.float32)
    soundfile.write(out, wave, 16000, format=form)
    return out.getvalue()


def _jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, format="JPEG")
    return out.getvalue()


def _mp4(frames: int = 12) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8)
    return video.encode_mp4(pixels, 4)


MEDIA = {
    "jpeg": (_jpeg, lambda raw: image.decode_image(raw, "x")),
    "png": (lambda: picture(9), lambda raw: image.decode_image(raw, "x")),
    "wav": (_wav, lambda raw: audio.decode_audio(raw, "x")),
    "flac": (lambda: _wav(form="FLAC"), lambda raw: audio.decode_audio(raw, "x")),
    "ogg": (lambda: _wav(form="OGG"), lambda raw: audio.decode_audio(raw, "x")),
    "mp3": (lambda: _wav(form="MP3"), lambda raw: audio.decode_audio(raw, "x")),
    "mp4": (_mp4, lambda raw: video.video_frames(raw, "x", VISION)),
    "mp4-sound": (_mp4, lambda raw: audio.decode_audio(raw, "x")),
}


@pytest.mark.parametrize("form", MEDIA)
def test_damaged_media_are_refused_or_read_never_crash(form: str) -> None:
    make, decode = MEDIA[form]
    whole = make()
    rng = np.random.default_rng(1)
    refused = 0
    for turn in range(60):
        raw = bytearray(whole)
        if turn % 3 == 0:
            raw = raw[: int(rng.integers(0, len(raw)))]
        else:
            for place in rng.integers(0, len(raw), size=int(rng.integers(1, 40))):
                raw[int(place)] = int(rng.integers(256))
        try:
            decode(bytes(raw))
        except MediaError as error:
            refused += str(error).startswith("x ")  # any other error, or another name, fails the test
    assert refused > 5
    for raw in (b"", b"\0" * 64, b"RIFF", b"<html>404</html>"):
        with pytest.raises(MediaError, match=r"^x "):
            decode(raw)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
def test_sound_cut_short_has_as_many_samples_as_counted(form: str) -> None:
    """A plan counts rows from the header: what is decoded later must be that many, or be refused both times."""
    whole = _wav(form=form.upper())
    for share in (0.3, 0.6, 0.9, 0.999):
        raw = whole[: int(len(whole) * share)]
        try:
            wave = audio.decode_audio(raw, "x")
        except MediaError:
            continue
        assert len(wave) == audio.count_samples(raw, "x")


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(MediaError, match=r"30000 x 30000 pixels|too large a picture"):
        image.decode_image(bomb, "x")


def _long_clip(seconds: int, fps: int = 1, *, form: str = "mp4") -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "g": "50"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        still = np.zeros((32, 32, 3), dtype=np.uint8)
        for number in range(seconds * fps):
            still[number % 32, :, number % 3] = number % 251
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_film_of_ten_hours_is_refused_from_its_header(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = _long_clip(36_000, form=form)
    monkeypatch.setattr(video, "_decoded", None)
    started = time.process_time()
    with pytest.raises(MediaError, match=r"x lasts 3(6|5)\d\d\d s, more than 3600 s; cut it into pieces"):
        video.video_frames(raw, "x", VISION)
    assert time.process_time() - started < 0.5


def test_a_long_film_is_decoded_around_its_frames_and_gives_the_same_pixels() -> None:
    raw = _long_clip(900)
    plan = video.plan_video(raw, "x", VISION)
    every = list(video.decode_frames(raw, "x"))
    track = video._read_track(raw, "x")
    assert track.seekable
    assert len(track.keys) > 10
    sought = list(video._wanted_frames(raw, "x", track, plan.frames))
    assert len(sought) == len(plan.frames) > 8
    for number, frame in zip(plan.frames, sought, strict=True):
        assert np.array_equal(frame, every[number])
