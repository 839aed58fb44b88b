"""The plan log: each step once, replays checked against it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from omni_ray.types.batch import MicroBatchPlan, StepPlan
from omni_ray.types.errors import PlanError
from pipelines.training.plan_log import PlanLog


def plan_of(step: int, rank: int = 0) -> StepPlan:
    batch = MicroBatchPlan(index=0, language_rank=rank, samples=("text:1",), lengths=(3,))
    return StepPlan(step=step, stage="S", micro_batches=(batch,), order=(0,), items=(), counts={"text": 2})


def test_replayed_plan_is_checked_and_not_written_twice(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "plans.jsonl", 0)
    assert [log.write(plan_of(step)) for step in (0, 1, 2)] == [True, True, True]
    assert log.write(plan_of(1)) is False
    with pytest.raises(PlanError, match="step 2 is replayed with another plan than it was recorded with"):
        log.write(dataclasses.replace(plan_of(2), counts={"text": 3}))
    log.forget(2)
    log.close()
    again = PlanLog(tmp_path / "plans.jsonl", 2)
    assert again.write(plan_of(2, rank=1)), "a resumed run may have other pool sizes"
    again.close()
    lines = (tmp_path / "plans.jsonl").read_text().splitlines()
    assert [StepPlan.from_json(line).step for line in lines] == [0, 1, 2]
    assert StepPlan.from_json(lines[2]).micro_batches[0].language_rank == 1
