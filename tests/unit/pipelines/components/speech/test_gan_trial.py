"""The trial of the adversarial stage: both sides alike but for it, and a verdict that follows the figures."""

from __future__ import annotations

import pytest

from pipelines.components.speech.gan_trial import FIGURES, recipes, table, verdict

FAIR: dict[str, float | None] = {name: 0.5 for name, _ in FIGURES}


def test_the_sides_differ_in_the_discriminators_alone() -> None:
    sides = recipes("codec-tiny", 30, 1e-3, 4)
    without, against = sides["without"], sides["with discriminators"]
    assert list(without.phases("2")) == ["polish"] == list(against.phases("2"))
    assert against.decoder.polish.adversarial.start == 0
    same = against.model_dump()
    same["decoder"]["polish"]["adversarial"]["start"] = None
    assert same == without.model_dump()


@pytest.mark.parametrize(
    ("changed", "better", "worse", "told"),
    [
        ({"stoi": 0.6, "mel distance": 0.4}, 2, 0, "2 figures are better and 0 worse than without: .* helps"),
        ({"stoi": 0.6, "mel distance": 0.6}, 1, 1, "1 figures are better and 1 worse than without: .* does not help"),
        ({"pesq": None}, 0, 0, "0 figures are better and 0 worse than without: .* does not help"),
    ],
)
def test_the_verdict_counts_judges(changed: dict[str, float | None], better: int, worse: int, told: str) -> None:
    found = verdict(FAIR, FAIR | changed)
    assert found[:2] == (better, worse)
    import re

    assert re.search(told, found[2])


def test_the_table_names_every_judge() -> None:
    text = table({"before": FAIR, "without": FAIR | {"pesq": None}})
    assert all(name in text for name, _ in FIGURES)
    assert text.count("0.5000") == 2 * len(FIGURES) - 1
