"""The order of samples is arithmetic: every prefix, restart and pool size sees the same."""

from __future__ import annotations

import pytest

from omni_ray.data.order import StageDraws, drawn_before, place, samples_of_step
from omni_ray.types.errors import DataError

STAGES = [
    StageDraws(steps=7, mixture={"text": 3, "speech": 0.5}),
    StageDraws(steps=5, mixture={"picture": 2, "text": 1.25}),
]
SIZES = {"text": 10, "speech": 4, "picture": 3}


def test_steps_together_draw_each_number_once() -> None:
    drawn: dict[str, list[int]] = {name: [] for name in SIZES}
    for step in range(12):
        for ref in samples_of_step(STAGES, step, SIZES, seed=1):
            drawn[ref.source].append(ref.index)
    assert {name: len(found) for name, found in drawn.items()} == {"text": 21 + 6, "speech": 3, "picture": 10}
    assert sorted(drawn["text"][:10]) == list(range(10)), "an epoch holds every sample once"
    assert drawn["text"][:10] != drawn["text"][10:20], "the next epoch is another permutation"
    assert drawn["text"][10:20] == [place(1, "text", 10, n) for n in range(10, 20)]


def test_position_is_the_step_number() -> None:
    for step in range(13):
        seen = [str(r) for s in range(step) for r in samples_of_step(STAGES, s, SIZES, seed=3)]
        assert sum(drawn_before(STAGES, step).values()) == len(seen)


def test_seed_changes_order() -> None:
    orders = {tuple(place(seed, "text", 100, n) for n in range(100)) for seed in range(5)}
    assert len(orders) == 5


def test_fractions_are_exact_in_the_long_run() -> None:
    stages = [StageDraws(steps=1000, mixture={"text": 0.1, "speech": 2.7})]
    assert drawn_before(stages, 1000) == {"text": 100, "speech": 2700}
    assert drawn_before(stages, 10) == {"text": 1, "speech": 27}


@pytest.mark.parametrize("step", [12, 99, -1])
def test_step_outside_the_stages_is_refused(step: int) -> None:
    with pytest.raises(DataError, match="draws no samples; the stages end at step 12"):
        samples_of_step(STAGES, step, SIZES, seed=0)


def test_empty_source_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="source 'text' holds no samples"):
        samples_of_step(STAGES, 0, {"speech": 4}, seed=0)
