"""Trouble in a run: a gradient that is no number, a disk that is full; told clearly, nothing lost."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_world import NETWORKS, STAGES, differing, mini_recipe, weights

from actors.pool_actor import PoolActor
from omni_ray.checkpoint import store
from omni_ray.observability.events import EventLog, event_log_to, read_events
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.errors import CheckpointError
from pipelines.training.loop import train

STEPS = 6
BAD_STEP = 3


def recipe_of(base: Path, **changes: Any) -> Any:
    raw = {"stages": [STAGES[2] | {"steps": STEPS}], "checkpoint": {"every_steps": 2, "snapshot_every": 2}}
    return mini_recipe(base, **(raw | changes))


def reference(base: Path, recipe: Any, folder: Path, without: int = -1) -> dict[str, torch.Tensor]:
    """Final weights of the single process; one step may be left out."""
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in range(recipe.total_steps):
        if step != without:
            oracle.step(builder.build(step))
    for name in NETWORKS:
        oracle.networks[name].save_pretrained(folder / "model" / name)
    return weights(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_a_gradient_that_is_no_number_skips_the_step_in_every_pool(
    base: Path, ray_cluster: None, tmp_path: Path
) -> None:
    """As if the step had never been: in the pool that made it and in all others, the expert bias included."""

    class Poisoned(PoolActor):
        closed = 0

        def finish(self, *others: Any) -> float:
            if self.worker.rank.pool == "audio" and self.closed == BAD_STEP:
                next(p for p in self.worker.network.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
            self.closed += 1
            return super().finish(*others)

    recipe = recipe_of(base)
    result = train(recipe, tmp_path / "run", quiet=True, actor=Poisoned)
    assert result.checkpoint is not None
    expected = reference(base, recipe, tmp_path / "reference", without=BAD_STEP)
    assert differing(weights(result.checkpoint), expected) == []
    stepped = [json.loads(line)["stepped"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert stepped == [step != BAD_STEP for step in range(STEPS)]


@pytest.mark.ray
@pytest.mark.full
def test_a_full_disk_leaves_earlier_checkpoints_and_a_clear_error(
    base: Path, ray_cluster: None, tmp_path: Path
) -> None:
    """The system itself refuses to write more than 100 kB into a file, from the second checkpoint on."""

    class Full(PoolActor):
        saved = 0

        def enter(self, phase: str) -> None:
            self.saved += phase == "start_saving"
            if self.saved == 2 and self.worker.rank.pool == "language":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    out = tmp_path / "run"
    with (
        event_log_to(EventLog(jsonl=tmp_path / "events.jsonl")),
        pytest.raises(
            CheckpointError, match=r"checkpoint of step 6: language, rank 0: .* could not be written .*File too"
        ),
    ):
        train(recipe_of(base), out, quiet=True, actor=Full)
    failed = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "checkpoint_failed"]
    assert len(failed) == 1, "step 4: told, and the run went on"
    assert [folder.name for folder in store.whole(out / "checkpoints")] == ["step-0000002"]
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-0000002"], "nothing half-written stays"
    result = train(recipe_of(base), out, resume=True, quiet=True)
    assert result.checkpoint is not None
    expected = reference(base, recipe_of(base), tmp_path / "reference")
    assert differing(weights(result.checkpoint), expected) == []
