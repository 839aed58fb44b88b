"""Samples: what a source yields, and what the chat template makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as it lies in a source, media still encoded.

    ``messages`` is a list of ``{"role": "system"|"user"|"assistant"|"voice", "content": [part, ...]}``; a part is
    ``{"type": "text", "text": str}``, or ``{"type": "image"|"video"|"audio"|"speech", "media": NAME}`` with NAME a
    key of ``media``.  ``audio`` is heard through the audio encoder, ``speech`` becomes codec rows; a ``speech`` part
    may carry ``"text"``: the words spoken in parallel.  ``audio_visual`` puts a film's sound (its own, or the member
    that ``"sound"`` names) between its frames, chunk by chunk; a film may name a window by ``from_s``, ``until_s`` and,
    for single frames, ``every_s``.  ``fragments`` holds ``{"text", "media"}`` pairs of which one side is dropped at
    random.  A text part with ``"as": "audio"`` stands between the audio
    marks, in the place of a sound.  Role ``text`` is running text without a role's name.
    """

    key: str
    """Unique inside its source, for instance ``picture-000017``."""
    kind: str
    """Task name, for statistics and mixtures, for instance ``image_question``."""
    messages: tuple[Mapping[str, Any], ...]
    """The conversation; loss falls on assistant and voice roles only (all text for kind ``text``)."""
    media: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by member name: png, jpg, wav, flac, mp4."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Ground truth for evaluation (digit, colour, direction, words, voice, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSpan:
    """Where one media item sits inside one encoded sample."""

    modality: Modality
    """The pool that makes its rows."""
    name: str
    """Member name in ``Sample.media``."""
    kind: str
    """``image``, ``video``, ``audio`` or ``speech``."""
    offset: int
    """First row inside the sample."""
    length: int
    """Rows: visual tokens, audio features, or codec frames + 1 (delay of one, networks.md 3.1)."""
    cost: float
    """Patches (vision) or frames (audio, speech): the unit of balancing."""
    grid: tuple[int, int, int] = (0, 0, 0)
    """Vision only: (frame pairs, patch rows, patch columns) of this span."""
    frame_pair: int = -1
    """Video only: which frame pair this span shows; -1 for a whole item."""
    target: bool = False
    """Speech only: its codec rows are answers, so the audio heads learn them."""
    frames: tuple[int, ...] = ()
    """Video only: numbers of the frames that it shows, where a window chose them; else ``frame_pair`` tells."""
    first_row: int = 0
    """Audio only: first of the sound's rows that stand here, where a sound is cut into chunks."""
    of_rows: int = 0
    """Audio only: rows of the whole sound where this span holds a stretch of it; 0 = the span is the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundPart:
    """A stretch of a sound's rows: the sound is encoded whole, and these rows of it are used."""

    wave: NDArray[np.float32]
    """[S], the whole sound."""
    first: int
    """First row."""
    rows: int
    """How many."""

    @property
    def nbytes(self) -> int:
        """Bytes of the wave, which all parts of a sound share."""
        return int(self.wave.nbytes)

    def tobytes(self) -> bytes:
        """Wave and stretch, for hashes."""
        return self.wave.tobytes() + bytes(str((self.first, self.rows)), "ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSample:
    """A sample as rows: what packing and the step plan need, before any feature exists."""

    key: str
    """Key of the sample it came from."""
    kind: str
    """Task name."""
    ids_T5: NDArray[np.int64]
    """[T, 5]: text id and four stored codec ids (PAD 3 where none)."""
    labels_T5: NDArray[np.int64]
    """[T, 5]: next-step targets, already shifted; IGNORE where there is no loss."""
    loss_kind_T: NDArray[np.int64]
    """[T]: LossKind of the text head at this row."""
    spans: tuple[MediaSpan, ...]
    """Media items in row order."""

    def __len__(self) -> int:
        return int(self.ids_T5.shape[0])
