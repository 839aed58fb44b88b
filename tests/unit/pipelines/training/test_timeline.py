"""Shares of an actor's time, and waits between its spans."""

from __future__ import annotations

import pytest

from omni_ray.observability.spans import Span, SpanTotal
from pipelines.training.timeline import shares, usage_text, with_waits


def span(name: str, start_s: float, seconds: float, depth: int = 0) -> Span:
    return Span(name=name, start_s=start_s, seconds=seconds, depth=depth, thread=1, fields={})


def test_shares_add_up_and_leave_setting_up_out() -> None:
    totals = {
        "build": SpanTotal(count=1, seconds=50.0),
        "encode": SpanTotal(count=4, seconds=2.0),
        "step": SpanTotal(count=1, seconds=1.0),
        "bridge.send": SpanTotal(count=4, seconds=1.0),
    }
    found = shares(totals, wall_s=10.0)
    assert found == pytest.approx({"busy": 0.3, "transfer": 0.1, "waiting": 0.6})
    assert "vision    busy  30.0 %  transfer  10.0 %  waiting  60.0 %" in usage_text({"vision": found})


def test_gaps_between_outermost_spans_are_waits() -> None:
    spans = (span("a", 0.0, 1.0), span("inside", 0.2, 0.1, depth=1), span("b", 1.5, 1.0), span("c", 2.50001, 1.0))
    waits = [(s.start_s, s.seconds) for s in with_waits(spans) if s.name == "wait"]
    assert waits == [(1.0, 0.5)]
    assert len(with_waits(spans)) == 5
