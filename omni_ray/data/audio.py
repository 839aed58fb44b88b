"""Sound bytes to mono samples, and how many rows they make."""

from __future__ import annotations

import functools
import io
import math
import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omni_ray.config.model import AudioConfig, CodecConfig
from omni_ray.data.reasons import reason
from omni_ray.types.errors import MediaError

Wave = NDArray[np.float32]
"""Mono samples in -1..1."""

MAX_SOUND_S = 120.0
"""Longest sound that is taken as one item (source: networks.md section 5)."""
_MIN_RATE, _MAX_RATE = 4_000, 384_000
_MAX_KERNEL = 4_000_000
_STREAMED_BYTES = 0x7FFF_0000
_FRAME_S, FRAME_SHIFT_S = 0.025, 0.010


def decode_audio(raw: bytes, name: str, sample_rate_hz: int = 16000, *, longest_s: float = MAX_SOUND_S) -> Wave:
    """Decode wav, flac, ogg, mp3, or the sound track of a video, to mono at the wanted rate.

    Args:
        raw: The file.  name: What errors call it.  sample_rate_hz: Wanted rate.  longest_s: Longer sounds are refused.
    Returns:
        [S] float32, S = ceil(frames * wanted rate / own rate).
    Raises:
        MediaError: no sound can be read, or it is empty, too long, or has values that are not finite; names the item.
    """
    wave, rate = _decode(raw, name, longest_s)
    check_length(len(wave), rate, name, longest_s)
    if not np.isfinite(wave).all():
        raise MediaError(f"{name} has samples that are not finite; export it again")
    return wave if rate == sample_rate_hz else resample(wave, rate, sample_rate_hz, name)


def count_samples(raw: bytes, name: str, sample_rate_hz: int = 16000) -> int:
    """How many samples :func:`decode_audio` will give; reads the header only where the format tells.

    Raises:
        MediaError: as :func:`decode_audio`.
    """
    import soundfile

    check_whole_wav(raw, name)
    try:
        info = soundfile.info(io.BytesIO(raw))
    except (soundfile.LibsndfileError, RuntimeError):
        return len(decode_audio(raw, name, sample_rate_hz))
    if info.format == "MP3":  # its header only estimates
        return len(decode_audio(raw, name, sample_rate_hz))
    check_length(info.frames, info.samplerate, name)
    return math.ceil(info.frames * sample_rate_hz / info.samplerate)


def resample(wave: Wave, rate: int, wanted: int, name: str = "sound") -> Wave:
    """Band-limited resampling, [ceil(S * wanted / rate)] float32.

    Raises:
        MediaError: the two rates have so little in common that the filter would not fit in memory.
    """
    common = math.gcd(rate, wanted)
    if (rate // common) * (wanted // common) > _MAX_KERNEL:
        raise MediaError(
            f"{name} has {rate} samples a second, too odd a rate for {wanted}; export it at 16000 or 48000"
        )
    with torch.no_grad():
        out: Wave = _resampler(rate, wanted)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
    return out


def audio_rows(samples: int, config: AudioConfig) -> int:
    """Rows of the audio encoder: T = floor((S - 25 ms) / 10 ms) + 1 fbank frames, then ceil(T / stride).

    Raises:
        MediaError: shorter than one 25 ms frame.
    """
    frame, shift = round(_FRAME_S * config.sample_rate_hz), round(FRAME_SHIFT_S * config.sample_rate_hz)
    if samples < frame:
        raise MediaError(f"a sound of {samples} samples is shorter than one frame of {frame}; send at least 25 ms")
    return math.ceil(((samples - frame) // shift + 1) / config.stride)


def codec_frames(samples: int, config: CodecConfig) -> int:
    """Codec frames N = ceil(S / hop); the last frame is filled up with silence.

    Raises:
        MediaError: empty, or longer than one codec segment.
    """
    if not 0 < samples <= config.max_segment_s * config.sample_rate_hz:
        raise MediaError(
            f"a speech segment of {samples / config.sample_rate_hz:.2f} s cannot be coded; "
            f"segments last up to {config.max_segment_s:g} s, cut it at a pause"
        )
    return math.ceil(samples / config.hop)


def encode_flac(wave: Wave, sample_rate_hz: int) -> bytes:
    """16-bit mono flac; equal samples give equal bytes."""
    import soundfile

    out = io.BytesIO()
    pcm = np.clip(np.round(wave * 32767.0), -32768, 32767).astype(np.int16)
    soundfile.write(out, pcm, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _decode(raw: bytes, name: str, longest_s: float) -> tuple[Wave, int]:
    import soundfile

    check_whole_wav(raw, name)
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as sound:
            check_length(sound.frames, sound.samplerate, name, longest_s)
            promised = sound.frames
            samples = sound.read(dtype="float32", always_2d=True)
            if len(samples) != promised:
                raise MediaError(f"{name} is cut short: {len(samples)} of {promised} samples; export it again")
            return samples.mean(axis=1, dtype=np.float32), int(sound.samplerate)
    except (soundfile.LibsndfileError, RuntimeError):
        return _decode_container(raw, name, longest_s)


def check_whole_wav(raw: bytes | mmap.mmap, name: str) -> None:
    """Refuse a wav that ends before its data do; the library would take what is there without a word."""
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little")
        if raw[at : at + 4] == b"data":
            # Recorders that stream write a size near the largest one and never come back to it.
            if len(raw) - at - 8 < size < _STREAMED_BYTES:
                raise MediaError(f"{name} is cut short: {len(raw) - at - 8} of {size} bytes; export it again")
            return
        at += 8 + size + size % 2


def _decode_container(raw: bytes, name: str, longest_s: float) -> tuple[Wave, int]:
    """The first sound track of any container that FFmpeg reads."""
    import av

    pieces: list[NDArray[Any]] = []
    try:
        with av.open(io.BytesIO(raw), "r") as container:
            if not container.streams.audio:
                raise MediaError(f"{name} has no sound track; send wav, flac, ogg, mp3, or a video with sound")
            stream = container.streams.audio[0]
            rate = int(stream.codec_context.sample_rate)
            check_length(1, rate, name)
            mono = av.AudioResampler(format="flt", layout="mono", rate=rate)
            total = 0
            for frame in container.decode(stream):
                for piece in mono.resample(frame):
                    pieces.append(piece.to_ndarray().reshape(-1))
                    total += pieces[-1].size
                check_length(total, rate, name, longest_s, short_is_fine=True)
            pieces += [piece.to_ndarray().reshape(-1) for piece in mono.resample(None)]
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MediaError(f"{name} cannot be decoded as sound ({reason(error)}); send wav, flac, ogg or mp3") from error
    if not pieces:
        raise MediaError(f"{name} has a sound track without samples; export it again")
    return np.concatenate(pieces).astype(np.float32, copy=False), rate


def check_length(
    frames: int, rate: int, name: str, longest_s: float = MAX_SOUND_S, *, short_is_fine: bool = False
) -> None:
    """Refuse what is empty, too long, or of a rate that nothing records at."""
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise MediaError(f"{name} has {rate} samples a second; rates from {_MIN_RATE} to {_MAX_RATE} can be read")
    if frames <= 0 and not short_is_fine:
        raise MediaError(f"{name} holds no samples; record it again")
    if frames > longest_s * rate:
        raise MediaError(f"{name} lasts {frames / rate:.1f} s, more than {longest_s:g} s; cut it into pieces")


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, wanted: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(rate, wanted)
