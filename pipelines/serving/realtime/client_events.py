"""Client events: their shape, checked before anything acts on them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_ray.types.errors import RequestError

MAX_APPEND_BYTES = 15 * 2**20
MAX_EVENT_ID = 512
MAX_DEPTH = 32
_REQUIRED: Mapping[str, tuple[tuple[str, type], ...]] = {
    "session.update": (("session", dict),),
    "input_audio_buffer.append": (("audio", str),),
    "input_audio_buffer.commit": (),
    "input_audio_buffer.clear": (),
    "conversation.item.create": (("item", dict),),
    "conversation.item.retrieve": (("item_id", str),),
    "conversation.item.delete": (("item_id", str),),
    "conversation.item.truncate": (("item_id", str), ("audio_end_ms", int)),
    "response.create": (),
    "response.cancel": (),
    "output_audio_buffer.clear": (),
    "input_video_buffer.append": (("image", str), ("ts_ms", int)),
}
"""Types that a client may send, and the fields that they must have."""


class EventError(RequestError):
    """A client event that cannot be followed; answered with an ``error`` event, the session goes on."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.kind = param, code, kind


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """A checked event."""

    type: str
    event_id: str | None
    body: Mapping[str, Any]


def read_event(text: str) -> ClientEvent:
    """Parse and check one text frame.

    Raises:
        EventError: not JSON, nested too deep, an unknown type, a field missing or of another kind.
    """
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise EventError("the frame is not JSON; send one JSON object", code="invalid_json") from None
    if not isinstance(body, dict):
        raise EventError('the frame is no JSON object; send {"type": ...}', code="invalid_json")
    event_id = body.get("event_id")
    if event_id is not None and (not isinstance(event_id, str) or len(event_id) > MAX_EVENT_ID):
        raise EventError(
            f"event_id must be a text of at most {MAX_EVENT_ID} characters", "event_id", "invalid_event_id"
        )
    try:
        return _checked(body, event_id)
    except EventError as error:
        error.event_id = event_id  # type: ignore[attr-defined]
        raise


def _checked(body: dict[str, Any], event_id: str | None) -> ClientEvent:
    kind = body.get("type")
    if not isinstance(kind, str) or not kind:
        raise EventError("the event has no type", "type", "missing_required_parameter")
    if kind not in _REQUIRED:
        raise EventError(
            f"event type {kind[:60]!r} is not known; types are {', '.join(_REQUIRED)}", "type", "unknown_event"
        )
    if kind != "input_audio_buffer.append" and _too_deep(body):
        raise EventError(f"the event is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
    for name, wanted in _REQUIRED[kind]:
        if name not in body:
            raise EventError(f"{kind} has no {name}", name, "missing_required_parameter")
        value = body[name]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise EventError(f"{name} must be {_NAMES[wanted]}", name, "invalid_type")
    return ClientEvent(kind, event_id, body)


def audio_of(body: Mapping[str, Any]) -> bytes:
    """The bytes of an append.

    Raises:
        EventError: no base64, or too much of it.
    """
    text: str = body["audio"]
    if len(text) > MAX_APPEND_BYTES * 4 // 3 + 4:
        raise EventError(
            f"audio holds more than {MAX_APPEND_BYTES >> 20} MiB; send it in pieces", "audio", "audio_too_large"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise EventError("audio is not base64", "audio", "invalid_base64") from None


_NAMES = {str: "a text", dict: "an object", int: "a whole number"}


def _no_constant(word: str) -> Any:
    raise ValueError(word)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
