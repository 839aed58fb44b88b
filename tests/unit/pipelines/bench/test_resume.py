"""The cases of the resume bench: they hold here, and a lost sample is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.bench.resume import JOBS, _builder, _control_case, _positions
from pipelines.bench.resume_cases import draw_case, interrupted, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_world(root, seed=0)
    return root


def test_interrupted_runs_draw_what_whole_runs_draw(world: Path) -> None:
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(20):
        case = draw_case(rng)
        whole, cut = interrupted(case, world)
        assert whole == cut, case
        assert sorted({step for step, _, _ in whole}) == list(range(sum(s["steps"] for s in case.stages)))
        kinds |= set(case.facts["kinds"])
    assert kinds == {"balance", "best_fit", "split"}


def test_a_lost_sample_is_seen(world: Path) -> None:
    whole, cut = interrupted(_control_case(), world, drop=True)
    assert whole != cut
    assert interrupted(_control_case(), world)[0] == whole


@pytest.mark.parametrize("job", JOBS)
def test_positions_weigh_the_same_after_few_and_many_rows(world: Path, job: str) -> None:
    few, many = (len(str(record)) for record in _positions(world, job, (500, 20_000)))
    assert many / few <= 1.02
    assert _builder(world, job).build(0).plan.step == 0
