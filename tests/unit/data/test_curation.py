"""The arithmetic of curation on cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from omni_ray.data.curation import Segment, agreement, clusters, colour_histograms, joined, ordinary, scene_starts


def _segment(recording: str, start_s: float, end_s: float, *words: str) -> Segment:
    times = tuple((word, start_s, end_s) for word in words)
    return Segment(recording=recording, start_s=start_s, end_s=end_s, words=words, times_s=times)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "a b x d", 0.75),
        ("a b c d", "b c d", 0.75),
        ("a", "b", 0.0),
        ("", "a b", 0.0),
        ("", "", 0.0),
        ("a b", "x a y b", 0.5),
    ],
)
def test_agreement(one: str, other: str, wanted: float) -> None:
    assert agreement(one.split(), other.split()) == agreement(other.split(), one.split()) == wanted


def test_out_of_the_ordinary_lengths_fall_out() -> None:
    usual = [_segment("r", 20.0 * i, 20.0 * i + 1.0 + 0.001 * i, "word") for i in range(400)]
    slow, fast = _segment("slow", 0.0, 60.0, "a"), _segment("fast", 0.0, 0.1, "abcdefgh")
    kept = ordinary([slow, slow, *usual, fast, fast])
    assert slow not in kept
    assert fast not in kept
    assert ordinary([slow, fast]) == [slow, fast], "two say nothing about what is ordinary"
    assert len(kept) >= 0.985 * len(usual)
    assert ordinary([]) == []


def test_neighbours_are_joined_over_short_gaps() -> None:
    parts = [_segment("b", 3.0, 4.0, "x"), _segment("a", 12.0, 13.0, "two"), _segment("a", 0.0, 2.5, "one")]
    found = joined([*parts, _segment("a", 23.0, 24.0, "three")])
    assert [(s.recording, s.start_s, s.end_s, s.words) for s in found] == [
        ("a", 0.0, 13.0, ("one", "two")),
        ("a", 23.0, 24.0, ("three",)),
        ("b", 3.0, 4.0, ("x",)),
    ]
    assert found[0].times_s == (("one", 0.0, 2.5), ("two", 12.0, 13.0))


def test_scenes_are_cut_where_the_colours_jump() -> None:
    rng = np.random.default_rng(0)
    dark, bright = (rng.integers(low, low + 20, (6, 16, 16, 3), dtype=np.uint8) for low in (0, 200))
    histograms = colour_histograms(np.concatenate([dark, bright, dark]))
    assert np.allclose(histograms.sum(axis=1), 1.0)
    assert scene_starts(histograms) == [0, 6, 12]
    features = np.stack([histograms[i : i + 6].mean(axis=0) for i in (0, 6, 12)])
    pytest.importorskip("sklearn")
    one, other, again = clusters(features, 2)
    assert one == again != other
    assert clusters(features[:1], 8) == [0]
