"""What decides whether a stretch of speech or film is good enough to train on: small interfaces, plain arithmetic.

Speech: voice activity cuts, two recognisers must agree, words are aligned, lengths that are out of the ordinary fall
out, neighbours with short gaps are joined. Film: scenes are cut where the colours jump, and clustered.

Source: networks.md section 5, the segment pipeline of speech-text interleaving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

JOIN_GAP_S = 10.0
"""Neighbouring segments of one recording with less between them become one."""
PERCENTILES = (0.5, 99.5)
"""Segments whose seconds a letter lie outside these fall out."""


class Segmenter(Protocol):
    """Finds speech: mono samples at 16 kHz -> (start, end) in seconds, ascending."""

    def segments(self, wave_S: NDArray[np.float32]) -> list[tuple[float, float]]: ...


class Recogniser(Protocol):
    """Hears a clip, says the words; the form of the judges in ``omni_ray.evaluation``."""

    name: str

    def hear(self, wave_S: NDArray[np.float32], sample_rate_hz: int) -> tuple[str, ...]: ...


class Aligner(Protocol):
    """Where words that are known are said: (word, start, end) in seconds; empty where they do not fit the sound."""

    def align(self, wave_S: NDArray[np.float32], words: Sequence[str]) -> list[tuple[str, float, float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of one recording with the words said in it."""

    recording: str
    """Key of the sample that it was cut from."""
    start_s: float
    end_s: float
    words: tuple[str, ...]
    """What both recognisers heard."""
    times_s: tuple[tuple[str, float, float], ...]
    """Every word with its start and end in the recording."""

    @property
    def seconds_a_letter(self) -> float:
        """How slowly it is said."""
        return (self.end_s - self.start_s) / max(1, sum(len(word) for word in self.words))


def agreement(one: Sequence[str], other: Sequence[str]) -> float:
    """1 - word edits / the longer length: 1 where two transcripts are the same, 0 where they share nothing."""
    if not one and not other:
        return 0.0
    best = np.arange(len(other) + 1)
    for row, word in enumerate(one, start=1):
        left = best.copy()
        best[0] = row
        for column, answer in enumerate(other, start=1):
            best[column] = min(left[column - 1] + (word != answer), left[column] + 1, best[column - 1] + 1)
    return 1.0 - float(best[-1]) / max(len(one), len(other))


def ordinary(segments: Sequence[Segment]) -> list[Segment]:
    """The segments whose seconds a letter lie within :data:`PERCENTILES` of all of them."""
    if not segments:
        return []
    slowness = np.array([segment.seconds_a_letter for segment in segments])
    # Taken outwards: of fewer than 200 segments none lies outside.
    low = np.percentile(slowness, PERCENTILES[0], method="lower")
    high = np.percentile(slowness, PERCENTILES[1], method="higher")
    return [segment for segment, value in zip(segments, slowness, strict=True) if low <= value <= high]


def joined(segments: Sequence[Segment], gap_s: float = JOIN_GAP_S) -> list[Segment]:
    """Neighbours of one recording with less than ``gap_s`` between them as one segment, in order."""
    out: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.recording, s.start_s)):
        last = out[-1] if out else None
        if last is not None and last.recording == segment.recording and segment.start_s - last.end_s < gap_s:
            words, times = last.words + segment.words, last.times_s + segment.times_s
            out[-1] = replace(last, end_s=segment.end_s, words=words, times_s=times)
        else:
            out.append(segment)
    return out


def colour_histograms(frames_FHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[F, 512]: share of each frame's pixels in 8 x 8 x 8 boxes of colour."""
    levels = (frames_FHW3 >> 5).astype(np.int64)
    boxes = (levels[..., 0] * 64 + levels[..., 1] * 8 + levels[..., 2]).reshape(len(frames_FHW3), -1)
    counts = np.stack([np.bincount(frame, minlength=512) for frame in boxes])
    return counts / boxes.shape[1]


def scene_starts(histograms_FC: NDArray[np.float64], jump: float = 0.5) -> list[int]:
    """First frames of scenes: frame 0, and each whose colours differ from the frame before by ``jump`` or more.

    Args:
        jump: Share of the pixels that change their box of colour, 0..1.
    """
    moved = np.abs(np.diff(histograms_FC, axis=0)).sum(axis=1) / 2
    return [0, *(int(i) + 1 for i in np.flatnonzero(moved >= jump))]


def clusters(features_NC: NDArray[np.float64], count: int, seed: int = 0) -> list[int]:
    """Cluster of every scene (k-means of scikit-learn); the same features and seed give the same ones.

    Raises:
        ImportError: scikit-learn is not installed (extra ``tiny-world``).
    """
    from sklearn.cluster import KMeans

    most = min(count, len(np.unique(features_NC, axis=0)))
    if most < 2:
        return [0] * len(features_NC)
    found = KMeans(n_clusters=most, random_state=seed, n_init=4).fit_predict(features_NC)
    return [int(cluster) for cluster in found]
