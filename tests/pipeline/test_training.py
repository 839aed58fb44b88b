"""Pools against the single-process reference, bit for bit; stop, resume and refusals, on a real local cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_world import NETWORKS, STAGES, differing, mini_recipe, weights, write_components
from torch import Tensor

from omni_ray.checkpoint import store
from omni_ray.config.load import save_recipe
from omni_ray.observability.events import EventLog, event_log_to, read_events
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.batch import StepPlan
from omni_ray.types.errors import CheckpointError, ResourceError
from omni_ray.types.modality import Modality
from pipelines.training.loop import train


@pytest.fixture(scope="module")
def reference(base: Path) -> dict[str, Tensor]:
    """Final weights of the single-process run, by network and published name."""
    recipe = mini_recipe(base)
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in range(recipe.total_steps):
        assert torch.isfinite(torch.tensor(oracle.step(builder.build(step)).norm))
    for name in NETWORKS:
        oracle.networks[name].save_pretrained(base / "reference" / "model" / name)
    return weights(base / "reference")


SHAPES: dict[str, dict[str, Any]] = {
    "one-each-barrier": {"schedule": {"kind": "barrier"}},
    "activations-made-again": {"pools": {"language": {"recompute": "selective"}, "vision": {"recompute": "full"}}},
    "two-each-pipelined-3-chunks": {
        "pools": {name: {"actors": 2} for name in ("vision", "audio", "language")},
        "schedule": {"kind": "pipelined", "window": 2, "num_chunks": 3},
    },
    "colocated-two-encoders-a-replica-2-chunks": {
        "placement": "colocate",
        "pools": {"vision": {"actors": 2, "recompute": "full"}, "audio": {"actors": 2, "recompute": "full"}},
        "schedule": {"kind": "barrier", "num_chunks": 2},
    },
}


@pytest.mark.ray
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[pytest.mark.full] * (s == "activations-made-again")) for s in SHAPES]
)
def test_pools_equal_the_reference_bit_for_bit(
    base: Path, reference: dict[str, Tensor], ray_cluster: None, shape: str, tmp_path: Path
) -> None:
    result = train(mini_recipe(base, **SHAPES[shape]), tmp_path, quiet=True, timeline=tmp_path / "timeline.json")
    assert result.finished
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), reference) == []
    plans = [StepPlan.from_json(line) for line in (tmp_path / "plans.jsonl").read_text().splitlines()]
    assert [plan.step for plan in plans] == list(range(10))
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert metrics.count('"loss/vision"') == 4, "losses are reported per modality, in the stage that has it"
    assert metrics.count('"bridge/vision>language_bytes"') == 4
    assert metrics.count('"bridge/language>vision_bytes"') == 4
    for shares in result.usage.values():
        assert sum(shares.values()) == pytest.approx(1.0)
    check_timeline(tmp_path / "timeline.json", SHAPES[shape])


def check_timeline(path: Path, changes: dict[str, Any]) -> None:
    """Every rank is a process of the trace, with its stages, transfers and waits."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    sizes = {name: changes.get("pools", {}).get(name, {}).get("actors", 1) for name in (*NETWORKS, "speech")}
    assert set(names) == {"driver", *(f"{name}-{rank}" for name, size in sizes.items() for rank in range(size))}
    seen = {name: {event["name"] for event in events if event["pid"] == pid} for name, pid in names.items()}
    assert seen["language-0"] >= {"language", "bridge.receive", "bridge.send", "finish", "step", "wait"}
    assert seen["vision-0"] >= {"encode", "encoder_backward", "bridge.receive", "bridge.send", "wait"}
    assert seen["driver"] >= {"submit", "collect"}


@pytest.mark.ray
@pytest.mark.full
def test_pools_in_half_precision_equal_the_reference_bit_for_bit(base: Path, ray_cluster: None, tmp_path: Path) -> None:
    """Masters are saved, a resume goes on from them, and the bridge carries half of the bytes."""
    precision = {name: {"precision": "bf16", "actors": 2} for name in ("vision", "audio", "language")}
    changes = {"stages": [STAGES[2]], "pools": precision, "checkpoint": {"every_steps": 2}}
    recipe = mini_recipe(base, **changes)
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in range(recipe.total_steps):
        oracle.step(builder.build(step))
    oracle.save(tmp_path / "reference")
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), weights(tmp_path / "reference")) == []
    shutil.rmtree(result.checkpoint)
    result = train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), weights(tmp_path / "reference")) == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    plans = [StepPlan.from_json(line) for line in (tmp_path / "run" / "plans.jsonl").read_text().splitlines()]
    for line, plan in zip(lines, plans, strict=True):
        rows = sum(item.length for item in plan.items if item.modality == Modality.VISION)
        assert line["bridge/vision>language_bytes"] == rows * recipe.networks.language.hidden_size * 2
    with pytest.raises(CheckpointError, match="was made by another recipe"):
        train(mini_recipe(base, **(changes | {"pools": {}})), tmp_path / "run", resume=True, quiet=True)


@pytest.mark.ray
def test_fast_sums_come_close_to_the_reference(
    base: Path, reference: dict[str, Tensor], ray_cluster: None, tmp_path: Path
) -> None:
    """All-reduce over two ranks and packed batches: other roundings, the same training."""
    sizes = {name: {"actors": 2} for name in ("vision", "audio", "language")}
    result = train(mini_recipe(base, pools=sizes, schedule={"reduce": "fast"}), tmp_path, quiet=True)
    assert result.checkpoint is not None
    found = weights(result.checkpoint)
    assert differing(found, reference) != [], "another order of sums shows in some bit"
    apart = sum(float((found[k] - reference[k]).double().square().sum()) for k in reference)
    size = sum(float(reference[k].double().square().sum()) for k in reference)
    # AdamW's first steps move a weight by the sign of its gradient, so a tiny gradient's rounding shows at full rate.
    assert (apart / size) ** 0.5 < 2e-3


def test_another_seed_gives_other_weights(base: Path, reference: dict[str, Tensor]) -> None:
    """The comparison above can fail: one changed number is seen."""
    recipe = mini_recipe(base, seed=1, stages=STAGES[:1])
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    oracle.step(builder.build(0))
    oracle.networks["language"].save_pretrained(base / "other" / "model" / "language")
    other = weights(base / "other")
    assert len(differing(other, {name: reference[name] for name in other})) > len(other) // 2


@pytest.mark.ray
def test_stop_signal_then_resume_ends_with_the_same_bits(
    base: Path, reference: dict[str, Tensor], ray_cluster: None, tmp_path: Path
) -> None:
    recipe, out = mini_recipe(base), tmp_path / "run"
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "pipelines.cli", "train", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = out / "metrics.jsonl"
    for _ in range(4000):
        if child.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0, output
    stopped = store.newest(out / "checkpoints")
    assert stopped is not None, output
    assert 0 < store.read_state(stopped)["step"] < recipe.total_steps, "stopped in the middle"
    with pytest.raises(CheckpointError, match="add --resume to continue it"):
        train(recipe, out, quiet=True)
    with pytest.raises(CheckpointError, match="was made by another recipe"):
        train(mini_recipe(base, seed=5), out, resume=True, quiet=True)
    others = tmp_path / "others"
    write_components(others, seed=1)
    with pytest.raises(CheckpointError, match=rf"was made with components {base / 'components'} .* not with {others} "):
        train(recipe.model_copy(update={"components": str(others)}), out, resume=True, quiet=True)
    result = train(recipe, out, resume=True, quiet=True)
    assert result.finished
    assert result.checkpoint is not None
    assert differing(weights(result.checkpoint), reference) == []
    steps = [line.split('"step": ')[1].split(",")[0] for line in metrics.read_text().splitlines()]
    assert steps == [str(step) for step in range(10)], "every step appears once"
    assert train(recipe, out, resume=True, quiet=True).seconds < result.seconds, "a finished run has nothing to do"


@pytest.mark.ray
def test_pools_that_do_not_fit_are_refused(base: Path, ray_cluster: None, tmp_path: Path) -> None:
    recipe = mini_recipe(base, pools={"vision": {"resources": {"custom": {"vision_gpu": 2}}}})
    with pytest.raises(ResourceError, match="the pools ask for 2 vision_gpu, yet the cluster has 0; lower pools"):
        train(recipe, tmp_path, quiet=True)
    waits = recipe.model_copy(update={"pools": recipe.pools.model_copy(update={"wait_s": 1.5})})
    events, started = tmp_path / "events.jsonl", time.monotonic()
    text = r"the pools ask for 2 vision_gpu, yet the cluster has 0 after 1.5 s; lower pools"
    with event_log_to(EventLog(jsonl=events)), pytest.raises(ResourceError, match=text):
        train(waits, tmp_path, quiet=True)
    assert time.monotonic() - started >= 1.5
    told = [event for event in read_events(events) if event["event"] == "waiting_for_cluster"]
    assert [event["short"] for event in told] == ["the pools ask for 2 vision_gpu, yet the cluster has 0"]
    assert told[0]["at_most_s"] == 1.5


def test_second_driver_of_a_folder_is_refused(base: Path, tmp_path: Path) -> None:
    """As long as the first one's process lives, and no longer: a killed one leaves nothing to clear away."""
    from pipelines.training.checkpoint import lock_run

    hold = "import sys, time; from pathlib import Path; from pipelines.training.checkpoint import lock_run\n"
    hold += "with lock_run(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"another run writes {tmp_path}; wait for it, or choose another --out"):
        train(mini_recipe(base), tmp_path, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"], "the second has touched nothing"
    first.kill()
    first.communicate()
    with lock_run(tmp_path):
        pass


def test_too_long_sample_is_refused_by_name(base: Path) -> None:
    from omni_ray.types.errors import DataError

    recipe = mini_recipe(base, stages=[STAGES[0] | {"seq_len": 3}])
    with pytest.raises(DataError, match=r"text:\d+ is \d+ rows long, stage S0 takes 3; raise its seq_len"):
        StepBuilder(recipe, base / "world").build(0)
