"""Codec rows: the delay, its inverse, and labels, in numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from omni_ray.data.codec_rows import fill_codec_rows, undo_delay
from omni_ray.types.batch import IGNORE
from omni_ray.types.errors import DataError


def _empty(rows: int, kind: str) -> tuple[Any, Any]:
    ids, labels = np.full((rows, 5), 3, dtype=np.int64), np.full((rows, 5), IGNORE, dtype=np.int64)
    return (ids, labels) if kind == "numpy" else (torch.from_numpy(ids), torch.from_numpy(labels))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_as_the_specification_writes_them(kind: str) -> None:
    ids, labels = _empty(5, kind)
    codes = np.array([[10, 11, 12, 13], [20, 21, 22, 23]])
    fill_codec_rows(ids, labels, 1, codes if kind == "numpy" else torch.from_numpy(codes), target=True)
    # s1 PAD PAD PAD / s2 a1 / EOS a2, a stored id is code + 32
    rows = [[3, 3, 3, 3], [42, 3, 3, 3], [52, 43, 44, 45], [2, 53, 54, 55], [3, 3, 3, 3]]
    assert ids[:, 1:].tolist() == rows
    x = IGNORE
    assert labels[:, 1:].tolist() == [[42, x, x, x], [52, 43, 44, 45], [2, 53, 54, 55], [x] * 4, [x] * 4]
    assert (ids[:, 0] == 3).all()
    assert (labels[:, 0] == x).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("frames", [1, 2, 17], ids="{}-frames".format)
def test_undo_is_the_inverse(kind: str, frames: int) -> None:
    codes = np.random.default_rng(frames).integers(0, 100, (frames, 4))
    ids, labels = _empty(frames + 4, kind)
    given = codes if kind == "numpy" else torch.from_numpy(codes)
    fill_codec_rows(ids, labels, 2, given, target=False)
    assert (labels == IGNORE).all()
    assert undo_delay(ids[2 : 2 + frames + 1]).tolist() == codes.tolist()
    assert undo_delay(ids[2:, 1:]).tolist() == codes.tolist(), "rows after the end are left out"
    assert undo_delay(ids[2 : 2 + frames]).tolist() == codes[: frames - 1].tolist(), "cut short: whole frames only"


def test_nothing_spoken_is_no_frames() -> None:
    assert undo_delay(np.array([[2, 3, 3, 3]])).shape == (0, 4)
    assert undo_delay(np.zeros((0, 4), dtype=np.int64)).shape == (0, 4)


def test_what_cannot_be_is_refused() -> None:
    ids, labels = _empty(4, "numpy")
    with pytest.raises(
        DataError, match=r"codes of shape \[4, 4\] need 5 rows of 4 at row 0, yet the sample has 4 rows"
    ):
        fill_codec_rows(ids, labels, 0, np.zeros((4, 4), dtype=np.int64), target=False)
    with pytest.raises(DataError, match="start at row 0"):
        fill_codec_rows(ids, labels, 0, np.zeros((2, 4), dtype=np.int64), target=True)
    with pytest.raises(DataError, match="holds the reserved id 5"):
        undo_delay(np.array([[40, 3, 3, 3], [2, 5, 40, 40]]))
