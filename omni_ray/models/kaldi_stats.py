"""Kaldi's accumulated statistics of features (``global_cmvn``), text and binary, read and written."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.types.errors import CheckpointError

_FORMS: dict[bytes, np.dtype[Any]] = {b"FM ": np.dtype("<f4"), b"DM ": np.dtype("<f8")}


def read_cmvn(path: Path, num_mels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every bin, float32 [M] each.

    mean = sum / count; deviation = max(float32 eps, sqrt(sum of squares / count - mean^2)).

    Raises:
        CheckpointError: missing, cut short, or of another size.
    Source: published demo code.
    """
    stats_2N = read_matrix(path)
    if stats_2N.shape != (2, num_mels + 1) or not np.isfinite(stats_2N).all() or stats_2N[0, -1] <= 0:
        raise CheckpointError(
            f"{path} holds a matrix {list(stats_2N.shape)} with count {stats_2N.flat[stats_2N.shape[-1] - 1]:g}, "
            f"expected [2, {num_mels + 1}] finite sums with a positive count; fetch it again"
        )
    mean_M = stats_2N[0, :-1] / stats_2N[0, -1]
    variance_M = stats_2N[1, :-1] / stats_2N[0, -1] - mean_M * mean_M
    mean, variance = torch.from_numpy(mean_M).float(), torch.from_numpy(variance_M).float()
    # Clamped before the root: rounding can leave a constant bin's variance below zero.
    return mean, variance.clamp_min(0).sqrt().clamp_min(torch.finfo(torch.float32).eps)


def read_matrix(path: Path) -> NDArray[np.float64]:
    """A Kaldi matrix [rows, columns], binary (float or double) or text.

    Raises:
        CheckpointError: missing, cut short, or of another kind.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); fetch the whole released folder") from error
    if raw[:2] == b"\0B" and raw[2:5] in _FORMS and len(raw) >= 15:
        kind = _FORMS[raw[2:5]]
        rows, columns = struct.unpack("<xixi", raw[5:15])
        if len(raw) != 15 + rows * columns * kind.itemsize:
            raise CheckpointError(f"{path} has {len(raw)} bytes, yet says {rows} x {columns} values; fetch it again")
        return np.frombuffer(raw, kind, offset=15).reshape(rows, columns).astype(np.float64)
    try:
        body = raw.decode().strip()
        if not (body.startswith("[") and body.endswith("]")):
            raise ValueError("no brackets")
        lines = [line.split() for line in body[1:-1].strip().splitlines()]
        return np.array([[float(word) for word in line] for line in lines if line], dtype=np.float64).reshape(
            sum(bool(line) for line in lines), -1
        )
    except ValueError as error:
        raise CheckpointError(f"{path} is no Kaldi matrix ({error}); fetch it again") from error


def write_cmvn(path: Path, mean_M: Tensor, std_M: Tensor) -> None:
    """Statistics of count 1 that :func:`read_cmvn` reads back (binary, double)."""
    mean, std = mean_M.double().numpy(), std_M.double().numpy()
    stats = np.stack([np.append(mean, 1.0), np.append(std**2 + mean**2, 0.0)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0BDM " + struct.pack("<bibi", 4, stats.shape[0], 4, stats.shape[1]) + stats.tobytes())
