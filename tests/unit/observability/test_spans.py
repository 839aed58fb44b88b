"""Spans nest, count, survive errors, stay bounded, and make a timeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_ray.observability.spans import SpanRecorder, write_chrome_trace


def test_nested_spans_end_inside_out_and_carry_fields() -> None:
    recorder = SpanRecorder()
    with recorder.span("step", step=4), recorder.span("vision.forward", rank=1) as fields:
        fields["bytes"] = 12
    inner, outer = recorder.spans()
    assert (inner.name, inner.depth, inner.fields) == ("vision.forward", 1, {"rank": 1, "bytes": 12})
    assert (outer.name, outer.depth, outer.fields) == ("step", 0, {"step": 4})
    assert outer.seconds >= inner.seconds >= 0


def test_error_is_recorded_and_travels_up() -> None:
    recorder = SpanRecorder()
    with pytest.raises(ValueError, match=r"^no$"), recorder.span("work"):
        raise ValueError("no")
    with recorder.span("next"):
        pass
    failed, following = recorder.spans()
    assert failed.fields == {"error": "ValueError"}
    assert following.depth == 0


def test_totals_outlive_the_bounded_timeline() -> None:
    recorder = SpanRecorder(capacity=3)
    for _ in range(10):
        with recorder.span("work"):
            pass
    assert len(recorder.spans()) == 3
    assert recorder.totals()["work"].count == 10
    recorder.clear()
    assert recorder.totals() == {}


def test_chrome_trace_names_processes(tmp_path: Path) -> None:
    recorder = SpanRecorder()
    with recorder.span("work", step=1):
        pass
    write_chrome_trace(tmp_path / "trace.json", {"vision-0": recorder.spans(), "audio-0": ()})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["audio-0", "vision-0"]
    (work,) = [e for e in events if e["ph"] == "X"]
    assert (work["name"], work["pid"], work["args"]) == ("work", 1, {"step": "1"})
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
