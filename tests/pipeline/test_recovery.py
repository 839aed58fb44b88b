"""Any actor may die at any phase: the run goes on and ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_world import NETWORKS, STAGES, differing, mini_recipe, weights

from omni_ray.checkpoint import store
from omni_ray.observability.events import EventLog, event_log_to, read_events
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.batch import StepPlan
from pipelines.bench.mortal import mortal_classes, order_death
from pipelines.training.loop import train

LONG = [STAGES[2] | {"name": "A", "steps": 12}, STAGES[3] | {"name": "B", "steps": 4}]


def recipe_of(base: Path, **changes: Any) -> Any:
    pools = {name: {"actors": 2 if name in ("vision", "language") else 1} for name in ("vision", "audio", "language")}
    raw = {"stages": LONG, "pools": pools, "checkpoint": {"every_steps": 7, "snapshot_every": 3}}
    return mini_recipe(base, **(raw | changes))


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> dict[str, torch.Tensor]:
    recipe = recipe_of(base)
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in range(recipe.total_steps):
        oracle.step(builder.build(step))
    for name in NETWORKS:
        oracle.networks[name].save_pretrained(base / "reference" / "model" / name)
    return weights(base / "reference")


@pytest.mark.ray
@pytest.mark.slow
def test_actors_that_die_are_replaced_and_the_bits_are_the_same(
    base: Path, undisturbed: dict[str, torch.Tensor], ray_cluster: None, tmp_path: Path
) -> None:
    """A rank with a sibling, a pool's only rank (its snapshot lies with another pool), and a frozen pool's rank."""
    orders = [("language-1", "language", 8), ("audio-0", "encoder_backward", 14), ("speech-0", "encode", 14)]
    pending = [order_death(_folder(tmp_path), name, phase, skip) for name, phase, skip in orders]
    events = tmp_path / "events.jsonl"
    with event_log_to(EventLog(jsonl=events)):
        result = train(recipe_of(base), tmp_path / "run", quiet=True, **_classes(tmp_path))
    assert [order for order in pending if order.exists()] == [], "every order was obeyed"
    assert result.finished
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), undisturbed) == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(16)), "every step is reported once"
    plans = [StepPlan.from_json(line) for line in (tmp_path / "run" / "plans.jsonl").read_text().splitlines()]
    assert [plan.step for plan in plans] == list(range(16)), "replayed plans are the recorded ones"
    assert store.whole(tmp_path / "run" / "checkpoints")[-1] == result.checkpoint
    lost = [event for event in read_events(events) if event["event"] == "recovered"]
    assert len(lost) == result.recoveries
    named = ", ".join(event["lost"] for event in lost)
    assert all(name.replace("-", " rank ") in named for name, _, _ in orders), named
    assert max(event["lost_steps"] for event in lost) <= 3, "no more than the snapshot interval"


@pytest.mark.ray
@pytest.mark.full
def test_shares_of_sharded_pools_come_back(base: Path, ray_cluster: None, tmp_path: Path) -> None:
    """No other rank of its pool has what it had: its snapshot lies with another pool; other pool forms resume."""
    shards = {"language": "zero3", "vision": "hsdp", "audio": "zero2"}
    pools = {name: {"actors": 2, "shard": shard, "recompute": "full"} for name, shard in shards.items()}
    recipe = recipe_of(base, stages=[LONG[0]], pools=pools)
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    norms = [oracle.step(builder.build(step)).norm for step in range(recipe.total_steps)]
    oracle.save(tmp_path / "reference")
    deaths = [("vision-1", "encode", 8), ("language-1", "add_pieces", 20)]
    orders = [order_death(_folder(tmp_path), *death) for death in deaths]
    events = tmp_path / "events.jsonl"
    with event_log_to(EventLog(jsonl=events)):
        result = train(recipe, tmp_path / "run", quiet=True, **_classes(tmp_path))
    assert [order for order in orders if order.exists()] == []
    assert 1 <= result.recoveries <= 2
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), weights(tmp_path / "reference")) == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["norm"] for line in lines] == norms
    found = read_events(events)
    assert max(event["lost_steps"] for event in found if event["event"] == "recovered") <= 3
    told = {event["pool"]: event for event in found if event["event"] == "sharded"}
    assert {name: event["shard"] for name, event in told.items()} == shards
    for name in ("language", "vision"):
        assert sum(told[name]["rank_bytes"]) == told[name]["whole_bytes"]
        assert max(told[name]["rank_bytes"]) < 0.6 * told[name]["whole_bytes"]
    shutil.rmtree(result.checkpoint)
    pools = {"language": {"actors": 3, "shard": "zero1"}, "vision": {"actors": 1}, "audio": {"actors": 2}}
    result = train(recipe_of(base, stages=[LONG[0]], pools=pools), tmp_path / "run", resume=True, quiet=True)
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), weights(tmp_path / "reference")) == []


def _folder(base: Path) -> Path:
    folder = base / "mortal"
    (folder / "orders").mkdir(parents=True, exist_ok=True)
    return folder


def _classes(base: Path) -> dict[str, type]:
    actor, feeder = mortal_classes(_folder(base))
    return {"actor": actor, "feeder": feeder}
