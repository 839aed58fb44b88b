"""Ratios are met to within a sample, in rows or samples, over any nesting; the same on every machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from omni_ray.config.mixture import Mixture
from omni_ray.data.mixture import ONE, MixtureTree, SampleRows, stream_of, stream_of_key
from omni_ray.types.errors import DataError

SIZES = {"text": 1000, "speech": 300, "picture": 500, "video": 50}
ROWS = {
    "text": lambda n: SampleRows(text=n),
    "speech": lambda n: SampleRows(text=n // 5, speech=n),
    "picture": lambda n: SampleRows(text=n // 3, vision=n),
    "video": lambda n: SampleRows(text=3, vision=4 * n),
}


def drawn(mixture: dict[str, Any], draws: int, step: int = 0, factors: dict[str, float] | None = None) -> Counter[str]:
    """Draw with random lengths; what was drawn, as samples and rows by source and rows by modality."""
    tree = MixtureTree(Mixture.model_validate(mixture), SIZES)
    credits = (0,) * tree.slots
    rng = np.random.default_rng(0)
    count: Counter[str] = Counter()
    for _ in range(draws):
        stream, way = tree.turn(credits, step, factors)
        rows = ROWS[stream.source](int(rng.lognormal(4, 0.7)) + 1)
        credits = tree.charge(credits, way, rows, step, factors)
        count[stream.key] += 1
        count[f"rows {stream.key}"] += rows.total
        count.update(dict(zip(("text rows", "vision rows", "speech rows"), rows.by_modality, strict=True)))
    assert max(abs(credit) for credit in credits) < 10_000 * ONE
    return count


def test_shares_of_samples_are_exact() -> None:
    mixture = {"blend": [{"source": "text", "weight": 5}, {"source": "speech", "proportion": 3}], "per": "samples"}
    for draws in (8, 80, 801):
        count = drawn(mixture, draws)
        assert abs(count["text"] - draws * 5 / 8) < 1


def test_shares_of_rows_are_met_within_a_sample() -> None:
    count = drawn({"blend": [{"source": "text", "weight": 1}, {"source": "video", "weight": 1}]}, 4000)
    assert count["rows text"] / count["rows video"] == pytest.approx(1, abs=0.01)
    assert count["text"] > 3 * count["video"], "fewer of the long ones"


def test_repeat_and_choose_count_samples_of_a_pass() -> None:
    mixture = {"blend": [{"source": "speech", "repeat": 2}, {"source": "video", "choose": 20}, {"source": "picture"}]}
    count = drawn(mixture, 600 + 20 + 500)
    assert {name: count[name] for name in ("speech", "video", "picture")} == {
        "speech": 600,
        "video": 20,
        "picture": 500,
    }


def test_blends_nest() -> None:
    inner = {"weight": 1, "blend": [{"source": "speech", "choose": 1}, {"source": "picture", "choose": 3}]}
    count = drawn({"blend": [{"source": "text", "weight": 1}, inner], "per": "samples"}, 800)
    assert (count["text"], count["speech"], count["picture"]) == (400, 100, 300)
    passes = {"blend": [{"source": "text"}, {"repeat": 0.5, "blend": [{"source": "speech"}, {"source": "picture"}]}]}
    count = drawn(passes, 1400)
    assert (count["text"], count["speech"], count["picture"]) == (1000, 150, 250)


def test_weights_follow_the_step_and_zero_draws_nothing() -> None:
    mixture = {
        "blend": [{"source": "text", "weight": {"linear": [[0, 0], [10, 3]]}}, {"source": "speech", "weight": 1}],
        "per": "samples",
    }
    assert drawn(mixture, 100, step=0)["text"] == 0
    assert drawn(mixture, 100, step=5)["text"] == 60
    assert drawn(mixture, 100, step=99)["text"] == 75


@pytest.mark.parametrize("shares", [(2, 1, 1), (1, 1, 1), (3, 1, 2)], ids=str)
def test_modalities_count_every_row_as_what_it_is(shares: tuple[int, int, int]) -> None:
    """2:1:1 of tokens, the text beside pictures and speech included (networks.md section 6)."""
    parts = {
        "text": [{"source": "text"}],
        "vision": [{"source": "picture", "weight": 1}, {"source": "video", "weight": 1}],
        "speech": [{"source": "speech"}],
    }
    mixture = {
        "modalities": {name: {"share": share, "blend": parts[name]} for name, share in zip(parts, shares, strict=True)},
        "take": {"rows": 100},
    }
    count = drawn(mixture, 3000)
    total = sum(count[f"{name} rows"] for name in parts)
    assert total > 100_000
    for name, share in zip(parts, shares, strict=True):
        assert count[f"{name} rows"] / total == pytest.approx(share / sum(shares), abs=0.01 * share / sum(shares))
    assert count["rows picture"] / count["rows video"] == pytest.approx(1, abs=0.02)


def test_a_share_out_of_reach_is_refused_by_name() -> None:
    """Pictures bring a third of their own in text, so that text cannot fall to a tenth."""
    mixture = {
        "modalities": {
            "text": {"share": 1, "blend": [{"source": "text"}]},
            "vision": {"share": 9, "blend": [{"source": "picture"}]},
        },
        "take": {"rows": 100},
    }
    with pytest.raises(
        DataError, match=r"the share of vision cannot be met: it is \d+ rows behind .* lower modalities\.vision\.share"
    ):
        drawn(mixture, 100_000)


def test_gap_factors_stay_inside_their_blend() -> None:
    inner = {
        "name": "seen",
        "weight": 1,
        "blend": [{"source": "picture", "weight": 1}, {"source": "video", "weight": 1}],
    }
    mixture = {"blend": [{"source": "text", "weight": 1}, inner], "per": "samples"}
    count = drawn(mixture, 800, factors={"video": 3.0})
    assert (count["text"], count["picture"], count["video"]) == (400, 100, 300)


def test_stretches_are_streams_of_their_own() -> None:
    stream = stream_of("text", SIZES, (0.25, 0.5))
    assert (stream.first, stream.size, stream.key) == (250, 250, "text[250:500]")
    assert stream_of_key(stream.key, SIZES) == stream
    assert stream_of_key("text", SIZES) == stream_of("text", SIZES)
    with pytest.raises(DataError, match=r"part \[0.001, 0.002\] of source 'speech' with 300 samples holds none"):
        stream_of("speech", SIZES, (0.001, 0.002))
    with pytest.raises(DataError, match="source 'nothing' holds no samples"):
        MixtureTree(Mixture.model_validate({"blend": [{"source": "nothing"}]}), SIZES)
