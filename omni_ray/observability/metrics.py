"""Metrics of a run: one JSON line a step, and the same figures for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from omni_ray.observability.events import plain_value
from omni_ray.types.errors import OmniError

METRICS_FILE = "metrics.jsonl"


def keep_steps_before(path: Path, step: int) -> int:
    """Drop every line of ``path`` at ``step`` or later, and a torn last line; a resumed run writes those again.

    Returns:
        Lines kept. The file is replaced as a whole, so that an interruption leaves the old one.
    """
    if not path.exists():
        return 0
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] < step:
            kept.append(line)
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
    return len(kept)


class MetricsWriter:
    """Writes ``FOLDER/metrics.jsonl`` and, if asked, TensorBoard events in ``FOLDER/tensorboard``.

    Args:
        folder: Made if it is missing.
        first_step: The step this run begins with. Lines at or after it (an interrupted run) are dropped, so that
            every step appears once however often the run was resumed.
        tensorboard: Also write TensorBoard event files.
    """

    def __init__(self, folder: Path, *, first_step: int = 0, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        keep_steps_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _BoardWriter(folder / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, figures: Mapping[str, Any], **fields: Any) -> None:
        """Write the figures of one step.

        Args:
            step: Global step.
            figures: Name (``loss/text``) to number; scalars of numpy and torch are fine.
            fields: What belongs to the step and is no curve, for instance ``stage="S1"``; JSON lines only.
        """
        numbers = {name: plain_value(value) for name, value in figures.items()}
        record = {"step": step, "time_s": time.time(), **plain_value(fields), **numbers}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.write(step, {name: float(number) for name, number in numbers.items()})

    def close(self) -> None:
        """Flush and close; may be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _BoardWriter:
    """TensorBoard event files written through TensorBoard's own record writer (no torch, no TensorFlow)."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as missing:
            raise OmniError("TensorBoard metrics need the package tensorboard; pip install tensorboard") from missing
        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder))
        if first_step > 0:
            # Tells TensorBoard that curves of an interrupted run end here.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [
            self._summary.Summary.Value(tag=name, simple_value=number if math.isfinite(number) else math.nan)
            for name, number in numbers.items()
        ]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()
