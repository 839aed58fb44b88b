"""Items that share a stretch of the sequence: sound between frames, speech between words (networks.md section 5).

Pure arithmetic and pure choices; what is left to chance comes from the caller's generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

LONE_CHUNK_S = 1.0
"""How long a single pair of frames is taken to last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One pair of frames, and the sound that follows it."""

    pair: int
    """Number of the pair."""
    first: int
    """First sound row."""
    rows: int
    """Sound rows; 0 in a chunk of frames alone."""


def chunks(times_s: Sequence[float], sound_rows: int, rows_per_s: float) -> list[Chunk]:
    """Sound cut along pairs of frames.

    A chunk takes the rows up to the next pair's time, counted from the first chunk with sound and rounded down: at 1 s
    and 12.5 rows a second that is 12, 13, 12, 13; the last takes the remainder. Where the film is longer than the
    sound, the earliest pairs stand alone, as history.

    Args:
        times_s: When each pair starts, rising.  sound_rows: Rows of the sound, at least 1.
        rows_per_s: Rows of the audio encoder a second.
    Source: LongCat-Flash-Omni report and demo code, chunked audio-visual interleave.
    """
    count = len(times_s)
    last_s = times_s[-1] - times_s[-2] if count > 1 else LONE_CHUNK_S
    end_s = times_s[-1] + last_s
    sound_s = sound_rows / rows_per_s
    alone = max([0, *(i for i in range(count) if end_s - times_s[i] >= sound_s - 1e-6)])
    edges = [int((time_s - times_s[alone]) * rows_per_s + 1e-6) for time_s in times_s[alone:]]
    edges = [min(edge, sound_rows) for edge in edges] + [sound_rows]
    silent = [Chunk(pair=i, first=0, rows=0) for i in range(alone)]
    heard = [Chunk(pair=alone + i, first=first, rows=stop - first) for i, (first, stop) in enumerate(pairwise(edges))]
    return silent + heard


def drop_fragments(fragments: Sequence[Mapping[str, Any]], chance: np.random.Generator) -> list[dict[str, Any]]:
    """Fragments of speech and text with one of the two dropped at random: ``T1, A2+T2, T3`` or ``A1, A2+T2, A3``.

    A sample drops either sound or text, from about half of its fragments, from one at least and (where there are
    several) not from all.

    Args:
        fragments: ``{"text": words, "media": sound}`` in order, cut at punctuation.  chance: What decides.
    Returns:
        Parts: text alone, a sound alone, or a sound with its words beside it.
    Source: LongCat-Flash-Omni report, Stage 1 speech-text interleave.
    """
    dropped = "media" if chance.random() < 0.5 else "text"
    drops = [bool(x) for x in chance.random(len(fragments)) < 0.5]
    place = int(chance.integers(len(fragments)))
    if not any(drops):
        drops[place] = True
    elif all(drops) and len(drops) > 1:
        drops[place] = False
    parts: list[dict[str, Any]] = []
    for fragment, drop in zip(fragments, drops, strict=True):
        if drop and dropped == "media":
            parts.append({"type": "text", "text": fragment["text"]})
        elif drop:
            parts.append({"type": "speech", "media": fragment["media"]})
        else:
            parts.append({"type": "speech", "media": fragment["media"], "text": fragment["text"]})
    return parts
