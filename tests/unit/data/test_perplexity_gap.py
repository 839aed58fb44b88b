"""The equations of the perplexity gap by hand, its clip, and its reference file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from omni_ray.config.mixture import GapConfig
from omni_ray.data.perplexity_gap import next_factors, read_reference
from omni_ray.types.errors import DataError


def test_equations_by_hand() -> None:
    config = GapConfig(eta=1.0, decay=0.9)
    after = next_factors({}, {"near": 1.0, "far": 1.5}, {"near": 2.0, "far": 1.0}, config)
    assert after["near"] == pytest.approx(1.0), "better than the reference: no gap"
    assert after["far"] == pytest.approx(0.9 + 0.1 * math.exp(0.5))
    again = next_factors(after, {"near": 1.0, "far": 1.5}, {"near": 2.0, "far": 1.0}, config)
    assert again["far"] == pytest.approx(0.9 * after["far"] + 0.1 * math.exp(0.5))


def test_weights_stay_in_their_range() -> None:
    config = GapConfig(decay=0.0)
    assert next_factors({}, {"far": 1e6}, {}, config) == {"far": 3.0}
    factors = {"far": 3.0}
    for _ in range(3):
        factors = next_factors(factors, {"far": 0.0}, {}, config)
    assert factors == {"far": 1.0}
    with pytest.raises(DataError, match="the log-perplexity of subset 'far' is nan; the model has diverged"):
        next_factors({}, {"far": math.nan}, {}, config)


def test_reference_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"a": 1.5, "b": 2, "c": "x"}))
    config = GapConfig(reference=str(path))
    assert read_reference(config, ("a", "b")) == {"a": 1.5, "b": 2.0}
    assert read_reference(GapConfig(), ("a",)) == {"a": 0.0}
    with pytest.raises(DataError, match="has no value for z; add their log-perplexities"):
        read_reference(config, ("a", "z"))
    with pytest.raises(DataError, match="c is 'x'; a number is needed"):
        read_reference(config, ("c",))
    with pytest.raises(DataError, match="cannot be read"):
        read_reference(GapConfig(reference=str(tmp_path / "no.yaml")), ("a",))
