"""Sample-rate conversion of any rate to any rate by windowed sinc, deterministic, no state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omni_ray.types.errors import MediaError

ZERO_CROSSINGS = 16
"""Of the sinc on each side of a sample."""
ROLL_OFF = 0.95
"""Pass band as a share of the lower Nyquist frequency."""
BLOCK = 1 << 16
"""Output samples made at once, so that memory does not grow with the recording."""
RATE_LIMITS_HZ = (1000, 768000)


class Resampler:
    """Conversion piece by piece: pushes and the flush together give what :func:`resample` gives, bit for bit.

    Keeps only the samples that later output still sees (a few hundred).

    Raises:
        MediaError: a rate outside 1 to 768 kHz.
    """

    def __init__(self, from_hz: int, to_hz: int) -> None:
        low, high = RATE_LIMITS_HZ
        if not low <= from_hz <= high or from_hz != int(from_hz):
            raise MediaError(f"sample rate is {from_hz} Hz; rates from {low} to {high} Hz can be converted")
        common = math.gcd(int(from_hz), to_hz)
        self.up, self.down = to_hz // common, int(from_hz) // common
        self.cutoff = ROLL_OFF * min(1.0, self.up / self.down)
        self.reach = math.ceil(ZERO_CROSSINGS / self.cutoff)
        self.taps = torch.arange(-self.reach + 1, self.reach + 1)
        self._held_S = torch.zeros(self.reach)  # the silence before the first sample
        self._first, self._taken, self._made = -self.reach, 0, 0

    def push(self, wave_S: Tensor) -> Tensor:
        """Take samples; gives those of the output that no later sample can change."""
        if self.up == self.down:
            return wave_S.float()
        self._held_S = torch.cat([self._held_S, wave_S.float()])
        self._taken += wave_S.shape[0]
        return self._until(max(self._made, -(-(self._taken - self.reach) * self.up // self.down)))

    def flush(self) -> Tensor:
        """The rest, as if silence followed; afterwards nothing may be pushed."""
        if self.up == self.down:
            return self._held_S[:0]
        self._held_S = torch.nn.functional.pad(self._held_S, (0, self.reach + 1))
        return self._until(-(-self._taken * self.up // self.down))

    def _until(self, count: int) -> Tensor:
        pieces = []
        for first in range(self._made, count, BLOCK):
            # Output n lies at input position n * down / up: whole part and fraction are kept as integers, hence exact.
            scaled_N = torch.arange(first, min(first + BLOCK, count)) * self.down
            whole_N, phase_N = scaled_N // self.up, scaled_N % self.up
            phases, which_N = phase_N.unique(return_inverse=True)
            kernels_PX = sinc_kernels(phases.double() / self.up, self.taps, self.cutoff)
            windows_NX = self._held_S[(whole_N - self._first).unsqueeze(1) + self.taps]
            pieces.append((windows_NX * kernels_PX[which_N]).sum(dim=1))
        self._made = max(self._made, count)
        spent = self._made * self.down // self.up - self.reach + 1 - self._first
        if spent > 0:
            self._held_S, self._first = self._held_S[spent:].clone(), self._first + spent
        return torch.cat(pieces) if pieces else self._held_S[:0]


def resample(wave_S: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Convert a mono signal to another rate; ceil(S * to / from) samples, float32.

    Raises:
        MediaError: a rate outside 1 to 768 kHz.
    """
    resampler = Resampler(from_hz, to_hz)
    if from_hz == to_hz:
        return wave_S.float()
    return torch.cat([resampler.push(wave_S), resampler.flush()])


def sinc_kernels(fraction_P: Tensor, taps_X: Tensor, cutoff: float) -> Tensor:
    """Hann-windowed sinc of each fractional position over its taps; [P, X] float32, each summing to one."""
    distance_PX = taps_X.double() - fraction_P.unsqueeze(1)
    window_PX = torch.cos((math.pi / 2) * (distance_PX * cutoff / ZERO_CROSSINGS).clamp(-1.0, 1.0)).square()
    kernel_PX = torch.sinc(cutoff * distance_PX) * window_PX
    return (kernel_PX / kernel_PX.sum(dim=1, keepdim=True)).float()
