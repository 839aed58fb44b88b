"""Metrics: every step once in the JSON lines, however often the run was resumed; curves in TensorBoard's own format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from omni_ray.observability.events import read_events
from omni_ray.observability.metrics import METRICS_FILE, MetricsWriter, keep_steps_before


def write_steps(folder: Path, steps: range, loss: float) -> None:
    with MetricsWriter(folder, first_step=steps.start, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"loss/text": np.float32(loss)}, stage="S0")


def test_resume_writes_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, range(0, 5), 2.0)
    with (tmp_path / METRICS_FILE).open("a") as torn:
        torn.write('{"step": 5, "los')
    write_steps(tmp_path, range(3, 7), 1.0)
    records = read_events(tmp_path / METRICS_FILE)
    assert [(r["step"], r["loss/text"]) for r in records] == [(0, 2), (1, 2), (2, 2), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert {r["stage"] for r in records} == {"S0"}


def test_keep_steps_before_missing_file(tmp_path: Path) -> None:
    assert keep_steps_before(tmp_path / METRICS_FILE, 3) == 0
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_the_curves_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, first_step=4) as writer:
        writer.write(4, {"loss/text": 2.5, "rate": float("nan")}, stage="S0")
        writer.write(5, {"loss/text": 1.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    curve = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss/text"]
    assert curve == [(4, 2.5), (5, 1.5)]
    assert any(e.HasField("session_log") and e.step == 4 for e in events)
