"""How a long recording is cut for coding, and the stretch of it that has to be held meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omni_ray.config.model import CodecConfig
from omni_ray.types.errors import ConfigError

MARGIN_FRAMES = 16
"""Frames of context on both sides of a segment of a long recording (0.96 s); coded, then dropped."""


class HeldSound:
    """The end of a growing recording, addressed by its frames from the beginning."""

    def __init__(self, hop: int) -> None:
        self.hop, self.samples = hop, 0
        self._first = 0
        self._pieces: list[Tensor] = []

    @property
    def frames(self) -> int:
        """Frames begun so far."""
        return -(-self.samples // self.hop)

    @property
    def whole_frames(self) -> int:
        """Frames that are complete."""
        return self.samples // self.hop

    def push(self, wave_S: Tensor) -> None:
        """More of it."""
        if len(wave_S):
            self._pieces.append(wave_S)
            self.samples += len(wave_S)

    def between(self, start: int, end: int) -> Tensor:
        """Samples of frames start..end, which must not have been dropped."""
        held_S = self._joined()
        return held_S[(start - self._first) * self.hop : (end - self._first) * self.hop]

    def drop_before(self, frame: int) -> None:
        """Forget what lies before a frame."""
        if frame > self._first:
            # A view: the next push joins it anew, and then what lies before is given back.
            self._pieces = [self._joined()[(frame - self._first) * self.hop :]]
            self._first = frame

    def _joined(self) -> Tensor:
        if len(self._pieces) != 1:
            self._pieces = [torch.cat(self._pieces) if self._pieces else torch.zeros(0)]
        return self._pieces[0]


def segment_spans(frames: int, config: CodecConfig) -> Iterator[tuple[int, int, int, int]]:
    """Cut a recording for coding: (start, keep_from, keep_to, end) in frames.

    Kept parts join without gap; every segment sees MARGIN_FRAMES of its neighbours, so a cut is not heard.
    """
    if frames <= longest_frames(config):
        yield 0, 0, frames, frames
        return
    keep_from = 0
    while keep_from < frames:
        span = segment_at(keep_from, frames, config)
        yield span
        keep_from = span[2]


def segment_at(keep_from: int, frames: int, config: CodecConfig) -> tuple[int, int, int, int]:
    """The segment of a recording of several that keeps frames from ``keep_from`` on.

    Raises:
        ConfigError: segments too short for their margins.
    """
    body = longest_frames(config) - 2 * MARGIN_FRAMES
    if body < 1:
        raise ConfigError(
            f"codec.max_segment_s is {config.max_segment_s:g}; cutting needs more than {2 * MARGIN_FRAMES} frames, "
            f"that is {2 * MARGIN_FRAMES * config.hop / config.sample_rate_hz:.2f} s"
        )
    keep_to = min(keep_from + body, frames)
    return max(0, keep_from - MARGIN_FRAMES), keep_from, keep_to, min(frames, keep_to + MARGIN_FRAMES)


def longest_frames(config: CodecConfig) -> int:
    """Most frames of one segment."""
    return int(config.max_segment_s * config.sample_rate_hz) // config.hop
