"""The language pool under DeepSpeed's ZeRO: close to the single process, resumed by anybody, mended after a death."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mini_world import STAGES, differing, mini_recipe, weights
from torch import Tensor

from actors.pool_actor import PoolActor
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import EventLog, event_log_to, read_events
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.reference import Reference
from pipelines.bench.mortal import mortal_classes, order_death
from pipelines.training.loop import train

TURNS = [
    STAGES[1] | {"name": "speaks", "steps": 2},
    STAGES[2] | {"name": "sees", "steps": 4},
    STAGES[3] | {"name": "frozen", "steps": 1},
    STAGES[2] | {"name": "again", "steps": 2},
]
"""What trains changes twice, and the language pool rests in between."""
TOLERANCE = 1e-6
"""Of the whole network's weights, and of every step's gradient norm; measured: 1.3e-8 and 4e-8."""

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def alone(base: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and final weights of the single process."""
    recipe = recipe_of(base)
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    norms = [oracle.step(builder.build(step)).norm for step in range(recipe.total_steps)]
    oracle.save(base / "reference")
    return norms, weights(base / "reference")


def recipe_of(base: Path, turns: Any = TURNS, **language: Any) -> Recipe:
    saved = {"every_steps": 4, "snapshot_every": 3, "keep": 9}
    pools = {"language": language, "vision": {"actors": 2}}
    return mini_recipe(base, stages=turns, schedule={"reduce": "fast"}, pools=pools, checkpoint=saved)


@needs_deepspeed
@pytest.mark.ray
@pytest.mark.parametrize(
    ("level", "ranks", "goes_on"),
    [
        pytest.param(3, 2, False, marks=pytest.mark.slow),
        *(pytest.param(level, ranks, True, marks=pytest.mark.full) for level, ranks in ((3, 2), (1, 3), (2, 3))),
    ],
)
def test_zero_comes_close_to_the_reference(
    base: Path,
    alone: tuple[list[float], dict[str, Tensor]],
    ray_cluster: None,
    tmp_path: Path,
    level: int,
    ranks: int,
    goes_on: bool,
) -> None:
    """Undisturbed; and where it goes on: resumed in the same form and after a death, with the same bits;
    resumed by one native rank."""
    norms, wanted = alone
    recipe = recipe_of(base, actors=ranks, backend="deepspeed", shard=f"zero{level}")
    events = tmp_path / "events.jsonl"
    with event_log_to(EventLog(jsonl=events)):
        first = train(recipe, tmp_path / "run", quiet=True)
    assert first.checkpoint is not None
    whole = weights(first.checkpoint)
    assert apart(whole, wanted) < TOLERANCE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["norm"] for line in lines] == pytest.approx(norms, rel=TOLERANCE)
    check_bytes([event for event in read_events(events) if event["event"] == "sharded"], level, ranks)
    if not goes_on:
        return
    shutil.rmtree(first.checkpoint)
    shutil.copytree(tmp_path / "run", tmp_path / "native")
    again = train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert again.checkpoint is not None
    assert differing(weights(again.checkpoint), whole) == []
    native = train(recipe_of(base), tmp_path / "native", resume=True, quiet=True)
    assert native.checkpoint is not None
    assert apart(weights(native.checkpoint), wanted) < TOLERANCE
    if level == 3:
        order = order_death(_folder(tmp_path), "language-1", "finish", 4)
        actor, feeder = mortal_classes(_folder(tmp_path))
        result = train(recipe, tmp_path / "mended", quiet=True, actor=actor, feeder=feeder)
        assert not order.exists()
        assert result.recoveries == 1
        assert result.checkpoint is not None
        assert differing(weights(result.checkpoint), whole) == []


class Poisoned(PoolActor):
    """The audio encoder's gradient of the second step is no number."""

    closed = 0

    def finish(self, *others: Any) -> float:
        """Close the step's gradient."""
        if self.worker.rank.pool == "audio" and self.closed == 1:
            next(p for p in self.worker.network.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
        self.closed += 1
        return super().finish(*others)


@needs_deepspeed
@pytest.mark.ray
@pytest.mark.full
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_skipped_step_leaves_nothing_behind(base: Path, ray_cluster: None, tmp_path: Path, level: int) -> None:
    """Another pool's gradient was no number: as if the step had never been."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    recipe = recipe_of(base, [STAGES[2]], actors=2, backend="deepspeed", shard=f"zero{level}")
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in (0, 2, 3):
        oracle.step(builder.build(step))
    oracle.save(tmp_path / "reference")
    result = train(recipe, tmp_path / "run", quiet=True, actor=Poisoned)
    assert result.checkpoint is not None
    stepped = [json.loads(line)["stepped"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert stepped == [True, False, True, True]
    assert apart(weights(result.checkpoint), weights(tmp_path / "reference")) < TOLERANCE


def check_bytes(told: list[dict[str, Any]], level: int, ranks: int) -> None:
    """Optimizer state is shared out in equal shares; weights with ZeRO-3 alone."""
    assert [event["shard"] for event in told] == [f"zero{level}"] * 3, "one a stage in which the pool trains"
    assert all(event["pool"] == "language" for event in told)
    for event in told:
        weights_bytes = event["whole_bytes"] / 3
        for rest, state in zip(event["rank_bytes"], event["rank_state_bytes"], strict=True):
            assert state == pytest.approx(event["whole_bytes"] / ranks, rel=0.02)
            assert rest - state == pytest.approx(weights_bytes / (ranks if level == 3 else 1), rel=0.02)


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, all weights together."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return float((difference / sum(float(theirs[name].double().square().sum()) for name in theirs)) ** 0.5)


def _folder(base: Path) -> Path:
    folder = base / "mortal"
    (folder / "orders").mkdir(parents=True, exist_ok=True)
    return folder
