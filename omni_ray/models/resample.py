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


def resample(wave_S: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Convert a mono signal to another rate; ceil(S * to / from) samples, float32.

    Raises:
        MediaError: a rate outside 1 to 768 kHz.
    """
    low, high = RATE_LIMITS_HZ
    if not low <= from_hz <= high or from_hz != int(from_hz):
        raise MediaError(f"sample rate is {from_hz} Hz; rates from {low} to {high} Hz can be converted")
    wave_S = wave_S.float()
    if from_hz == to_hz:
        return wave_S
    common = math.gcd(int(from_hz), to_hz)
    up, down = to_hz // common, int(from_hz) // common
    cutoff = ROLL_OFF * min(1.0, up / down)
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    count = -(-wave_S.shape[0] * up // down)
    padded_S = torch.nn.functional.pad(wave_S, (reach, reach + 1))
    taps = torch.arange(-reach + 1, reach + 1)
    pieces = []
    for first in range(0, count, BLOCK):
        # Output n lies at input position n * down / up: whole part and fraction are kept as integers, hence exact.
        scaled_N = torch.arange(first, min(first + BLOCK, count)) * down
        whole_N, phase_N = scaled_N // up, scaled_N % up
        phases, which_N = phase_N.unique(return_inverse=True)
        kernels_PX = sinc_kernels(phases.double() / up, taps, cutoff)
        windows_NX = padded_S[(whole_N + reach).unsqueeze(1) + taps]
        pieces.append((windows_NX * kernels_PX[which_N]).sum(dim=1))
    return torch.cat(pieces) if pieces else wave_S[:0]


def sinc_kernels(fraction_P: Tensor, taps_X: Tensor, cutoff: float) -> Tensor:
    """Hann-windowed sinc of each fractional position over its taps; [P, X] float32, each summing to one."""
    distance_PX = taps_X.double() - fraction_P.unsqueeze(1)
    window_PX = torch.cos((math.pi / 2) * (distance_PX * cutoff / ZERO_CROSSINGS).clamp(-1.0, 1.0)).square()
    kernel_PX = torch.sinc(cutoff * distance_PX) * window_PX
    return (kernel_PX / kernel_PX.sum(dim=1, keepdim=True)).float()
