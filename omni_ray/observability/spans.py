"""Spans: where the time goes, by name, and as a timeline that trace viewers open."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_CAPACITY = 20_000
"""Spans kept for the timeline; totals are kept for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of work."""

    name: str
    """What was done, for instance ``vision.forward``."""
    start_s: float
    """Seconds since the epoch, so that spans of several processes share one axis."""
    seconds: float
    """How long it took, by the monotonic clock."""
    depth: int
    """0 for an outermost span of its thread, 1 inside one, and so on."""
    thread: int
    """Identifier of the thread."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Step, micro-batch, rank, bytes and the like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanTotal:
    """All spans of one name together."""

    count: int
    """How many ended."""
    seconds: float
    """Their time, added up."""


class SpanRecorder:
    """Collects spans of one process; memory is bounded by ``capacity``, totals never forget."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._count: defaultdict[str, int] = defaultdict(int)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def span(self, name: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Measure the block; it may add to the yielded fields. A block that raises is recorded with ``error``."""
        depth = getattr(self._local, "depth", 0)
        self._local.depth = depth + 1
        start_s, began = time.time(), time.perf_counter()
        try:
            yield fields
        except BaseException as problem:
            fields["error"] = type(problem).__name__
            raise
        finally:
            seconds = time.perf_counter() - began
            self._local.depth = depth
            self._keep(
                Span(
                    name=name,
                    start_s=start_s,
                    seconds=seconds,
                    depth=depth,
                    thread=threading.get_ident(),
                    fields=fields,
                )
            )

    def _keep(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)
            self._count[span.name] += 1
            self._seconds[span.name] += span.seconds

    def spans(self) -> tuple[Span, ...]:
        """The newest spans, in the order in which they ended."""
        with self._lock:
            return tuple(self._spans)

    def totals(self) -> dict[str, SpanTotal]:
        """Count and seconds by name, over everything ever recorded here."""
        with self._lock:
            return {name: SpanTotal(count=n, seconds=self._seconds[name]) for name, n in sorted(self._count.items())}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._spans.clear()
            self._count.clear()
            self._seconds.clear()


def write_chrome_trace(path: Path, spans_by_process: dict[str, tuple[Span, ...]]) -> None:
    """Write a timeline in the Chrome trace event format (open it in Perfetto or ``chrome://tracing``).

    Args:
        spans_by_process: Spans under the name of the process that made them, for instance ``vision-0``.
    """
    events: list[dict[str, Any]] = []
    for pid, (process, spans) in enumerate(sorted(spans_by_process.items())):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": process}})
        events.extend(
            {
                "name": span.name,
                "ph": "X",
                "pid": pid,
                "tid": span.thread,
                "ts": span.start_s * 1e6,
                "dur": span.seconds * 1e6,
                "args": {key: str(value) for key, value in span.fields.items()},
            }
            for span in spans
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    aside.replace(path)


_process_recorder = SpanRecorder()


def process_recorder() -> SpanRecorder:
    """The recorder that :func:`span` uses in this process."""
    return _process_recorder


@contextmanager
def span(name: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Measure the block in the process's recorder: ``with span("bridge.send", step=3, bytes=n): ...``."""
    with _process_recorder.span(name, **fields) as given:
        yield given
