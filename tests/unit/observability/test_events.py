"""Events reach the stream and the file with their fields."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from omni_ray.observability.events import EventLog, emit, event_log_to, format_event, plain_value, read_events


def test_event_line_names_fields_in_order() -> None:
    line = format_event("step_done", {"step": 3, "seconds": 0.1234567891, "note": "two words", "empty": ""})
    assert line == 'step_done step=3 seconds=0.123457 note="two words" empty=""'


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.array(7), 7),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ((1, Path("a")), [1, "a"]),
        ({1: True}, {"1": True}),
    ],
)
def test_plain_value(value: object, plain: object) -> None:
    assert plain_value(value) == plain
    json.loads(json.dumps(plain_value(value), allow_nan=False))


def test_log_writes_both_and_appends(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "deep" / "events.jsonl"
    for step in (1, 2):
        log = EventLog(stream=stream, jsonl=path, common={"run": "r"})
        log.emit("step_done", step=step)
        log.close()
    assert stream.getvalue() == "step_done step=1\nstep_done step=2\n"
    assert [(e["event"], e["run"], e["step"]) for e in read_events(path)] == [
        ("step_done", "r", 1),
        ("step_done", "r", 2),
    ]


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n{"eve')
    assert read_events(path) == [{"event": "a"}]


def test_process_log_goes_to_stderr_and_can_be_redirected(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    emit("before")
    with event_log_to(EventLog(stream=stream)):
        emit("inside", pool="vision")
    emit("after")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "before\nafter\n"
    assert stream.getvalue() == "inside pool=vision\n"
