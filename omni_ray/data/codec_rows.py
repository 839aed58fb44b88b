"""Codec frames to language rows and back: four streams, acoustic ones one row late (networks.md 3.1)."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, AUDIO_RESERVED, IGNORE, NUM_CODEBOOKS
from omni_ray.types.errors import DataError

# T rows of a sample, N frames of a segment, R = N + 1 rows of a segment
Rows = TypeVar("Rows", NDArray[np.int64], Tensor)


def fill_codec_rows(ids_T5: Rows, labels_T5: Rows, offset: int, codes_N4: Rows, *, target: bool) -> None:
    """Write a segment's N + 1 rows in place, and its shifted labels where it is an answer.

    Row 0 is ``s_1, PAD, PAD, PAD``; row t ``s_{t+1}, a1_t, a2_t, a3_t``; the last ``EOS, a1_N, a2_N, a3_N``; a stored
    id is a code + 32. Labels of the row before say the same, PAD left out.

    Args:
        ids_T5, labels_T5: int64, changed in place (numpy or torch alike).  offset: First row of the segment.
        codes_N4: Codes of the codec, semantic first.  target: Whether the audio heads learn these rows.
    Raises:
        DataError: the rows do not fit, or a target segment starts at row 0, where nothing precedes it.
    """
    count = int(codes_N4.shape[0])
    if count < 1 or codes_N4.shape[1] != NUM_CODEBOOKS or not 0 <= offset <= ids_T5.shape[0] - count - 1:
        raise DataError(
            f"codes of shape {list(codes_N4.shape)} need {count + 1} rows of {NUM_CODEBOOKS} at row {offset}, "
            f"yet the sample has {ids_T5.shape[0]} rows"
        )
    last = offset + count
    ids_T5[offset, 1:] = AUDIO_PAD
    ids_T5[offset:last, 1] = codes_N4[:, 0] + AUDIO_RESERVED
    ids_T5[last, 1] = AUDIO_EOS
    ids_T5[offset + 1 : last + 1, 2:] = codes_N4[:, 1:] + AUDIO_RESERVED
    if not target:
        return
    if offset < 1:
        raise DataError("an answer's codec rows start at row 0, so no row can predict them; put a role before them")
    labels_T5[offset - 1 : last, 1:] = ids_T5[offset : last + 1, 1:]
    labels_T5[offset - 1, 2:] = IGNORE


def undo_delay(rows_R4: Rows) -> Rows:
    """The inverse of the delay: frame t is row t's semantic id and row t + 1's acoustic ids.

    Args:
        rows_R4: Stored ids of one segment, [R, 4] or [R, 5] with the text column first; rows after the semantic EOS
            are left out, and a segment cut short (no EOS) gives the R - 1 frames that are whole.
    Returns:
        [N, 4] codes.
    Raises:
        DataError: a reserved id stands where a code must be.
    """
    rows = rows_R4[:, 1:] if rows_R4.shape[1] == NUM_CODEBOOKS + 1 else rows_R4
    ends = [i for i, stored in enumerate(rows[:, 0].tolist()) if stored == AUDIO_EOS]
    count = ends[0] if ends else max(0, int(rows.shape[0]) - 1)
    if count + 1 > rows.shape[0]:
        count = max(0, int(rows.shape[0]) - 1)
    codes = rows[:count] * 0
    codes[:, 0] = rows[:count, 0] - AUDIO_RESERVED
    codes[:, 1:] = rows[1 : count + 1, 1:] - AUDIO_RESERVED
    if count and int(codes.min()) < 0:
        raise DataError(
            f"a speech segment of {count} frames holds the reserved id {int(codes.min()) + AUDIO_RESERVED} "
            f"where a code is due; mask ids below {AUDIO_RESERVED} other than {AUDIO_EOS} when sampling"
        )
    return codes
