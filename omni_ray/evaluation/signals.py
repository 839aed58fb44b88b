"""Signal judges of a reconstruction against its original: STOI here, PESQ where its package is installed.

Legend: S samples, T frames of 25.6 ms, B third-octave bands, M segments of 30 frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omni_ray.models.resample import resample
from omni_ray.types.errors import DataError

Wave = NDArray[np.float32]

STOI_RATE_HZ, FRAME, HOP, FFT = 10000, 256, 128, 512
BANDS, LOWEST_HZ, SEGMENT = 15, 150.0, 30
QUIET_DB = 40.0
"""Frames of the original so far below its loudest one are silence, and leave both signals."""
CLIP = 1.0 + 10.0 ** (15.0 / 20.0)
"""A band may exceed the original's by so much (a signal-to-distortion ratio of -15 dB) and no more."""
TINY = float(np.finfo(np.float64).eps)
PESQ_RATE_HZ = 16000


def stoi(original_S: Wave, made_S: Wave, sample_rate_hz: int) -> float | None:
    """Short-time objective intelligibility: 1 for equal sound, near 0 for noise.

    Args:
        original_S, made_S: The same moment at the same place; the longer one is cut.
    Returns:
        None where fewer than 30 frames (0.4 s) of the original are not silence: there it is not defined.
    Source: Taal, Hendriks, Heusdens, Jensen 2011, equations 1 to 6.
    """
    length = min(len(original_S), len(made_S))
    rows = [_at_rate(wave[:length], sample_rate_hz, STOI_RATE_HZ).astype(np.float64) for wave in (original_S, made_S)]
    loud = _loud_only(rows[0], rows[1])
    if loud is None:
        return None
    bands_BT = [np.sqrt(_third_octaves() @ np.abs(_spectrum(row_S)) ** 2) for row_S in loud]
    if bands_BT[0].shape[1] < SEGMENT:
        return None
    x_BMT, y_BMT = (np.lib.stride_tricks.sliding_window_view(band, SEGMENT, axis=1) for band in bands_BT)
    scaled = y_BMT * (_norm(x_BMT) / (_norm(y_BMT) + TINY))
    limited = np.minimum(scaled, x_BMT * CLIP)
    return float((_unit(limited) * _unit(x_BMT)).sum(axis=2).mean())


def pesq(original_S: Wave, made_S: Wave, sample_rate_hz: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), about 1 (bad) to 4.6 (equal), by the package ``pesq``.

    Raises:
        DataError: the package is not installed, or it finds no speech in the clip.
    """
    try:
        from pesq import PesqError
        from pesq import pesq as measure
    except ImportError as missing:
        raise DataError(
            "pesq is not installed; it compiles C code, so it is no part of any extra: pip install pesq"
        ) from missing
    length = min(len(original_S), len(made_S))
    rows = [_at_rate(wave[:length], sample_rate_hz, PESQ_RATE_HZ) for wave in (original_S, made_S)]
    try:
        return float(measure(PESQ_RATE_HZ, rows[0], rows[1], "wb"))
    except PesqError as problem:
        raise DataError(f"PESQ cannot judge a clip of {length / sample_rate_hz:.2f} s: {problem}") from problem


def _at_rate(wave_S: Wave, from_hz: int, to_hz: int) -> Wave:
    out: Wave = resample(torch.from_numpy(np.ascontiguousarray(wave_S, dtype=np.float32)), from_hz, to_hz).numpy()
    return out


def _window() -> NDArray[np.float64]:
    return np.hanning(FRAME + 2)[1:-1]


def _frames(row_S: NDArray[np.float64]) -> NDArray[np.float64]:
    # The frame that ends exactly with the signal is left out, as the authors' program does.
    starts = range(0, len(row_S) - FRAME, HOP)
    return np.array([_window() * row_S[start : start + FRAME] for start in starts]).reshape(-1, FRAME)


def _loud_only(x_S: NDArray[np.float64], y_S: NDArray[np.float64]) -> tuple[Any, Any] | None:
    x_TF, y_TF = _frames(x_S), _frames(y_S)
    if not len(x_TF):
        return None
    level_T = 20.0 * np.log10(np.linalg.norm(x_TF, axis=1) + TINY)
    keep_T = level_T > level_T.max() - QUIET_DB
    return _overlap_add(x_TF[keep_T]), _overlap_add(y_TF[keep_T])


def _overlap_add(rows_TF: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.zeros((len(rows_TF) + 1) * HOP)
    for place, row in enumerate(rows_TF):
        out[place * HOP : place * HOP + FRAME] += row
    return out


def _spectrum(row_S: NDArray[np.float64]) -> NDArray[np.complex128]:
    return np.fft.rfft(_frames(row_S), n=FFT).T


def _third_octaves() -> NDArray[np.float64]:
    lines_F = np.linspace(0, STOI_RATE_HZ, FFT + 1)[: FFT // 2 + 1]
    bands_BF = np.zeros((BANDS, len(lines_F)))
    for band in range(BANDS):
        low, high = (LOWEST_HZ * 2.0 ** ((2 * band + side) / 6.0) for side in (-1, 1))
        first, last = (int(np.abs(lines_F - edge).argmin()) for edge in (low, high))
        bands_BF[band, first:last] = 1.0
    return bands_BF


def _norm(x_BMT: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.linalg.norm(x_BMT, axis=2, keepdims=True)
    return out


def _unit(x_BMT: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = x_BMT - x_BMT.mean(axis=2, keepdims=True)
    return centred / (_norm(centred) + TINY)
