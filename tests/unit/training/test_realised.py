"""What a run has drawn is counted from its plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_world import mini_recipe, write_world

from omni_ray.training.prepare import StepBuilder, tokens_by_modality
from omni_ray.training.realised import Realised, realised_text, rows_of


def test_counts_are_those_of_the_steps(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    builder = StepBuilder(mini_recipe(tmp_path), tmp_path / "world")
    realised, tokens = Realised(), {"text": 0, "vision": 0, "audio": 0, "speech": 0}
    for step in range(4, 8):  # stage S2, every modality
        prepared = builder.build(step)
        realised.add(prepared.plan)
        found = tokens_by_modality(prepared)
        assert rows_of(prepared.plan) == {
            "text": found["text"],
            "vision": found["vision"],
            "speech": found["audio"] + found["speech"],
        }
        tokens = {name: count + found[name] for name, count in tokens.items()}
    report = realised.report()
    assert list(report) == ["S2"]
    assert report["S2"]["rows"]["text"] == tokens["text"]
    assert report["S2"]["rows"]["speech"] == tokens["audio"] + tokens["speech"]
    samples = {source: facts["samples"] for source, facts in report["S2"]["sources"].items()}
    assert samples == {"text": 12, "picture": 24, "speech": 8, "audio": 12, "film": 4}
    rows = sum(facts["rows"] for facts in report["S2"]["sources"].values())
    assert rows == sum(tokens.values())
    text = realised_text(report, {"picture": 2})
    assert f"of {rows} rows" in text
    assert f"text {tokens['text'] / rows:.1%}" in text
    assert text.endswith("could not be used: 2 of picture")
    assert report["S2"]["rows"]["vision"] / rows == pytest.approx(tokens["vision"] / rows)
