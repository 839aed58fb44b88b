"""Logs are events with fields: a name and what belongs to it, for people on a stream and for programs as JSON lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Fields = Mapping[str, Any]


def plain_value(value: Any) -> Any:
    """Turn a field into something JSON can carry: numbers, text, lists and maps stay, all else becomes text.

    Objects with ``item()`` (numpy and torch scalars) give their number; non-finite floats become text,
    because JSON has no word for them.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return plain_value(value.item())
    return str(value)


def format_event(name: str, fields: Fields) -> str:
    """One line for people: the name, then ``key=value`` in the order given; text with blanks is quoted."""
    words = [name]
    for key, value in fields.items():
        shown = plain_value(value)
        if isinstance(shown, float):
            shown = f"{shown:.6g}"
        elif not isinstance(shown, str) or " " in shown or not shown:
            shown = json.dumps(shown, ensure_ascii=False)
        words.append(f"{key}={shown}")
    return " ".join(words)


class EventLog:
    """Where events go: a stream for people, a file of JSON lines for programs, either, both or neither."""

    def __init__(
        self, *, stream: TextIO | None = None, jsonl: Path | None = None, common: Fields | None = None
    ) -> None:
        self._stream = stream
        self._common = dict(common or {})
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if jsonl is not None:
            jsonl.parent.mkdir(parents=True, exist_ok=True)
            self._file = jsonl.open("a", encoding="utf-8")

    def emit(self, name: str, **fields: Any) -> None:
        """Write one event now; its line in the file also carries ``time_s`` (since the epoch) and the common fields."""
        with self._lock:
            if self._stream is not None:
                print(format_event(name, fields), file=self._stream, flush=True)
            if self._file is not None:
                record = {"time_s": time.time(), "event": name, **self._common, **fields}
                self._file.write(json.dumps(plain_value(record), ensure_ascii=False) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file; a later :meth:`emit` still reaches the stream."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


class _StandardError:
    """The stream of the default log: looks ``sys.stderr`` up at each line, so that a redirected one is used."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


_current = EventLog(stream=_StandardError())  # type: ignore[arg-type]


def emit(name: str, **fields: Any) -> None:
    """Write an event to the process's log: standard error unless :func:`event_log_to` says otherwise.

    Usual fields: ``step``, ``stage``, ``pool``, ``rank``, ``bytes``, ``seconds``.
    """
    _current.emit(name, **fields)


@contextmanager
def event_log_to(log: EventLog) -> Iterator[EventLog]:
    """Make ``log`` the process's event log inside the block, then close it and put the former one back."""
    global _current
    former, _current = _current, log
    try:
        yield log
    finally:
        _current = former
        log.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of an event or metrics file, in order; a torn last line (a killed writer) is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records
