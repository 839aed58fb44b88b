"""A stretch of a long film: dense pairs while somebody speaks, single frames now and then while somebody answers.

Two frames a second make a pair a second; sparse frames come every ``every_s`` and stand twice, a pair each
(networks.md section 5, sparse-dense).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_ray.config.model import VisionConfig
from omni_ray.data.video import DEFAULT_FPS, fit_frames, frame_times
from omni_ray.types.errors import DataError, MediaError

WORDS = ("from_s", "until_s", "every_s")
_LATE_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which stretch is looked at, and how often."""

    from_s: float = 0.0
    until_s: float | None = None
    """None = to the end of the film."""
    every_s: float | None = None
    """Seconds between single frames; None = dense pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """Pairs of frames of a window."""

    times_s: tuple[float, ...]
    """When each pair starts, in the film's time."""
    frames: tuple[tuple[int, ...], ...]
    """Numbers of the frames of each pair."""
    grid: tuple[int, int]
    """(patch rows, patch columns) of a frame."""


def window_of(part: Mapping[str, Any], where: str) -> Window | None:
    """The window that a part names; None where it shows the whole film.

    Raises:
        DataError: times that are no times.
    """
    named = {word: part[word] for word in WORDS if part.get(word) is not None}
    if not named:
        return None
    if not all(isinstance(value, int | float) and value >= 0 for value in named.values()):
        raise DataError(f"{where} has a window of {named}; from_s, until_s and every_s are seconds")
    window = Window(**{word: float(value) for word, value in named.items()})
    if window.every_s == 0 or (window.until_s is not None and window.until_s <= window.from_s):
        raise DataError(f"{where} has a window of {named}, which holds no time; let from_s < until_s and every_s > 0")
    return window


def plan_window(raw: bytes, name: str, window: Window, config: VisionConfig) -> WindowPlan:
    """Choose the frames of a window; a look takes the frame that is shown at its time.

    Raises:
        MediaError: as ``plan_video``, or a window beyond the end of the film.
    """
    stamps_s, height, width = frame_times(raw, name)
    every_s = window.every_s or 1 / DEFAULT_FPS
    looks = math.floor((stamps_s[-1] - window.from_s) / every_s + _LATE_S) + 1
    if window.until_s is not None:  # the frame at its end belongs to what comes after
        looks = min(looks, math.ceil((window.until_s - window.from_s) / every_s - _LATE_S))
    if looks < 1:
        raise MediaError(f"{name} ends after {stamps_s[-1]:.1f} s, before the window at {window.from_s:g} s; cut it")
    times_s = [window.from_s + i * every_s for i in range(looks)]
    numbers = [max(bisect_right(stamps_s, time_s + _LATE_S) - 1, 0) for time_s in times_s]
    step = 1 if window.every_s is not None else config.temporal_patch_size
    pairs = [numbers[i : i + step] for i in range(0, looks, step)]
    if len(pairs) * config.temporal_patch_size > config.max_frames:
        raise MediaError(f"{name}: a window of {looks} frames, more than {config.max_frames}; look less often")
    grid = fit_frames(height, width, len(pairs), config)
    filled = tuple(tuple(pair + [pair[-1]] * (config.temporal_patch_size - len(pair))) for pair in pairs)
    return WindowPlan(times_s=tuple(times_s[::step]), frames=filled, grid=grid)
