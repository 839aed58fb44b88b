"""Sound on the wire: pcm16 and g711 bytes to float samples and back, at any rate, in pieces of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from omni_ray.models.resample import ROLL_OFF, ZERO_CROSSINGS, sinc_kernels

# S samples, N output samples, P phases, X taps

Wave = NDArray[np.float32]
Kind = Literal["audio/pcm", "audio/pcmu", "audio/pcma"]
KINDS: tuple[Kind, ...] = ("audio/pcm", "audio/pcmu", "audio/pcma")
MODEL_RATE_HZ = 16000
"""What the encoders and the detector hear."""
CODEC_RATE_HZ = 24000
"""What the codec says."""


@dataclass(frozen=True, slots=True)
class Format:
    """How sound lies in bytes: little-endian 16 bit, or one byte of g711 a sample; always one channel."""

    kind: Kind = "audio/pcm"
    rate_hz: int = CODEC_RATE_HZ

    @property
    def width(self) -> int:
        """Bytes a sample."""
        return 2 if self.kind == "audio/pcm" else 1

    def ms(self, num_bytes: int) -> float:
        """How long so many bytes sound."""
        return 1000.0 * num_bytes / (self.width * self.rate_hz)


class Resampler:
    """A running signal from one rate to another; what comes out does not depend on how it was cut.

    The kernel is that of ``models.resample``; an output is given once every input under its kernel has come, which is
    1.1 ms later from 24 to 16 kHz.
    """

    def __init__(self, from_hz: int, to_hz: int) -> None:
        common = math.gcd(from_hz, to_hz)
        self.up, self.down = to_hz // common, from_hz // common
        cutoff = ROLL_OFF * min(1.0, self.up / self.down)
        self.reach = math.ceil(ZERO_CROSSINGS / cutoff)
        self._kernels_PX = _kernel_table(self.up, self.reach, cutoff)
        self._kept = np.zeros(self.reach, np.float32)
        self._first = -self.reach  # input place of _kept[0]; zeros stand before the signal
        self._next = 0  # number of the next output
        self._taken = 0

    def push(self, chunk_S: Wave) -> Wave:
        """The outputs that are now certain."""
        self._taken += len(chunk_S)
        if self.up == self.down:
            return chunk_S.astype(np.float32, copy=False)
        self._kept = np.concatenate([self._kept, chunk_S.astype(np.float32, copy=False)])
        # Output n looks at inputs up to n * down // up + reach.
        last = self._first + len(self._kept) - 1 - self.reach
        return self._make(max(self._next, (last + 1) * self.up // self.down + 2), last)

    @property
    def arrived(self) -> int:
        """Outputs for whose time input has come, certain or not."""
        return self._taken * self.up // self.down

    def flush(self) -> Wave:
        """The outputs that remain when the signal ends here: ceil(S * to / from) in all."""
        if self.up == self.down:
            return np.zeros(0, np.float32)
        total = -(-self._taken * self.up // self.down)
        self._kept = np.concatenate([self._kept, np.zeros(self.reach + 1, np.float32)])
        return self._make(total, self._taken)

    def _make(self, until: int, last: int) -> Wave:
        number_N = np.arange(self._next, max(self._next, until)) * self.down
        whole_N, phase_N = number_N // self.up, number_N % self.up
        fit = int(np.searchsorted(whole_N, last, side="right"))
        whole_N, phase_N = whole_N[:fit], phase_N[:fit]
        taps_X = np.arange(-self.reach + 1, self.reach + 1)
        windows_NX = self._kept[(whole_N - self._first)[:, None] + taps_X]
        out_N = (windows_NX * self._kernels_PX[phase_N]).sum(axis=1, dtype=np.float32)
        self._next += fit
        drop = max(0, self._next * self.down // self.up - self.reach + 1 - self._first)
        self._kept, self._first = self._kept[drop:], self._first + drop
        return out_N


class SoundReader:
    """Bytes of a client to samples at 16 kHz; a sample may be cut anywhere."""

    def __init__(self, form: Format, rate_hz: int = MODEL_RATE_HZ) -> None:
        self.form = form
        self._rest = b""
        self._resampler = Resampler(form.rate_hz, rate_hz)

    def push(self, raw: bytes) -> Wave:
        """Samples in -1..1 that are now certain."""
        raw = self._rest + raw
        whole = len(raw) - len(raw) % self.form.width
        self._rest = raw[whole:]
        return self._resampler.push(decode(raw[:whole], self.form.kind))

    @property
    def arrived(self) -> int:
        """Samples at 16 kHz whose time has come; a few more than were given."""
        return self._resampler.arrived

    def flush(self) -> Wave:
        """What remains; half a sample is dropped."""
        self._rest = b""
        return self._resampler.flush()


class SoundWriter:
    """Samples of the codec to a client's bytes."""

    def __init__(self, form: Format, rate_hz: int = CODEC_RATE_HZ) -> None:
        self.form = form
        self._resampler = Resampler(rate_hz, form.rate_hz)

    def push(self, wave_S: Wave) -> bytes:
        """Bytes that are now certain."""
        return encode(self._resampler.push(wave_S), self.form.kind)

    def flush(self) -> bytes:
        """The last ones."""
        return encode(self._resampler.flush(), self.form.kind)


def decode(raw: bytes, kind: Kind) -> Wave:
    """Whole samples to floats in -1..1."""
    if kind == "audio/pcm":
        return np.frombuffer(raw, "<i2").astype(np.float32) / 32768.0
    return _G711[kind][np.frombuffer(raw, np.uint8)]


def encode(wave_S: Wave, kind: Kind) -> bytes:
    """Floats to bytes; what is louder than full scale is clipped."""
    pcm_S = np.clip(np.round(wave_S * 32767.0), -32768, 32767).astype("<i2")
    if kind == "audio/pcm":
        return pcm_S.tobytes()
    return _nearest(kind)[pcm_S.astype(np.int32) + 32768].tobytes()


@lru_cache(maxsize=32)
def _kernel_table(up: int, reach: int, cutoff: float) -> Wave:
    phases = torch.arange(up, dtype=torch.float64) / up
    kernels_PX: Wave = sinc_kernels(phases, torch.arange(-reach + 1, reach + 1), cutoff).numpy()
    return kernels_PX


def _mu_law() -> NDArray[np.int32]:
    """Linear values of the 256 bytes (ITU-T G.711, table 2)."""
    byte = ~np.arange(256) & 0xFF
    size = (((byte & 0x0F) << 3) + 0x84 << (byte >> 4 & 7)) - 0x84
    return np.where(byte & 0x80, -size, size).astype(np.int32)


def _a_law() -> NDArray[np.int32]:
    """Linear values of the 256 bytes (ITU-T G.711, table 1)."""
    byte = np.arange(256) ^ 0x55
    exponent, mantissa = byte >> 4 & 7, byte & 0x0F
    size = np.where(exponent == 0, (mantissa << 4) + 8, (mantissa << 4) + 0x108 << np.maximum(exponent - 1, 0))
    return np.where(byte & 0x80, size, -size).astype(np.int32)


_G711: dict[str, Wave] = {
    "audio/pcmu": (_mu_law() / 32768.0).astype(np.float32),
    "audio/pcma": (_a_law() / 32768.0).astype(np.float32),
}


@lru_cache(maxsize=2)
def _nearest(kind: Kind) -> NDArray[np.uint8]:
    """The byte nearest to each of the 65,536 linear values."""
    values = _mu_law() if kind == "audio/pcmu" else _a_law()
    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / 2.0
    return order[np.searchsorted(middles, np.arange(-32768, 32768))].astype(np.uint8)
