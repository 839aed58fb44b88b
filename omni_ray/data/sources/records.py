"""From a record (a row, a line, the json of a tar sample) to a sample: the forms of conversations that people have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

MediaLoader = Callable[[Any, str], tuple[str, bytes]]
"""What a record says of a medium, and the kind (image, audio, ...) -> (name, bytes); raises DataError."""

PICTURES: tuple[str, ...] = ("png", "jpg", "jpeg", "webp", "bmp")
SOUNDS: tuple[str, ...] = ("wav", "flac", "ogg", "mp3")
FILMS: tuple[str, ...] = ("mp4", "mkv", "webm")
FIELDS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images", "picture", *PICTURES),
    "video": ("video", "videos", *FILMS),
    "audio": ("audio", "audios", "sound", "speech", *SOUNDS),
    "question": ("question", "prompt", "instruction", "query"),
    "answer": ("answer", "response", "output", "completion"),
    "text": ("text", "caption", "txt", "sentence", "transcription", "transcript"),
}
"""Fields of a plain record, by what they are taken for; ``columns`` of a source renames others to these."""
MEDIA_KINDS = ("image", "video", "audio")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACES = re.compile(r"<(image|video|audio)>")


def sample_from_record(key: str, record: Any, load: MediaLoader) -> Sample:
    """A sample of a record in any of the known forms.

    ``messages`` (this project's form, see :class:`Sample`); ``conversations`` of ``from``/``value`` turns with
    ``<image>`` places (LLaVA); a medium with a text (a caption or transcript), or with a question and an answer; a
    text alone.

    Raises:
        DataError: none of these, a medium that is missing, or text that is no Unicode.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"its record is a {type(record).__name__}, not an object with messages")
    if record.get("messages") is not None:
        sample = _messages(key, record, load)
    elif record.get("conversations") is not None:
        sample = _conversation(key, record, load)
    else:
        sample = _plain(key, record, load)
    check_text(sample.messages)
    return sample


def parse_json(raw: bytes) -> Any:
    """JSON of UTF-8 bytes.

    Raises:
        DataError: bytes that are no UTF-8, or no JSON.
    """
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"its json is not UTF-8 (byte {error.start}); write it in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"its json cannot be read ({error})") from error


def check_text(messages: Any) -> None:
    """Refuse text that no tokenizer takes: halves of surrogate pairs, which json lets through.

    Raises:
        DataError: such text.
    """
    try:
        json.dumps(messages, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"its text holds half a surrogate pair at place {error.start}; write it in UTF-8") from error


def _messages(key: str, record: Mapping[str, Any], load: MediaLoader) -> Sample:
    messages = record["messages"]
    if isinstance(messages, str | bytes):  # a column of a table
        messages = parse_json(messages.encode() if isinstance(messages, str) else messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError("its messages are not a list of objects")
    media: dict[str, bytes] = {}
    for message in messages:
        content = message.get("content", [])
        for part in content if isinstance(content, list) else []:
            wanted = part.get("media") if isinstance(part, dict) else None
            if wanted is not None and wanted not in media:
                media[wanted] = load(wanted, str(part.get("type")))[1]
    facts = record.get("facts") or {}
    facts = parse_json(facts.encode()) if isinstance(facts, str) else facts
    kind = str(record.get("kind") or "unknown")
    return Sample(key=key, kind=kind, messages=tuple(messages), media=media, facts=facts)


def _conversation(key: str, record: Mapping[str, Any], load: MediaLoader) -> Sample:
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("its conversations are not a list of turns")
    waiting = {kind: _listed(record, kind) for kind in MEDIA_KINDS}
    media: dict[str, bytes] = {}
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, text = _ROLES.get(str(turn.get("from", turn.get("role")))), turn.get("value", turn.get("content"))
        if role is None or not isinstance(text, str):
            raise DataError(f"a turn of its conversations is from {turn.get('from')!r}; known are {', '.join(_ROLES)}")
        parts = _turn_parts(text, waiting, media, load)
        messages.append({"role": role, "content": parts})
    left = {kind: len(values) for kind, values in waiting.items() if values}
    if left:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None or any("media" in part for message in messages for part in message["content"]):
            raise DataError(f"it has {left} more media than places such as <image> in its text")
        # LLaVA's own convention: media without a place stand before the first question.
        first["content"] = [_part(kind, v, media, load) for kind in left for v in waiting[kind]] + first["content"]
    kinds = sorted({part["type"] for message in messages for part in message["content"]} - {"text"})
    return Sample(key=key, kind="_".join([*kinds, "conversation"]), messages=tuple(messages), media=media)


def _turn_parts(
    text: str, waiting: dict[str, list[Any]], media: dict[str, bytes], load: MediaLoader
) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    pieces = _PLACES.split(text)
    for place, piece in enumerate(pieces):
        if place % 2 and not waiting[piece]:
            raise DataError(f"its text has a place <{piece}> for which the record names no {piece}")
        if place % 2:
            parts.append(_part(piece, waiting[piece].pop(0), media, load))
        elif piece.strip("\n"):
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _plain(key: str, record: Mapping[str, Any], load: MediaLoader) -> Sample:
    media: dict[str, bytes] = {}
    parts = [_part(kind, value, media, load) for kind in MEDIA_KINDS for value in _listed(record, kind)]
    question, answer, text = (_text(record, what) for what in ("question", "answer", "text"))
    answer = answer if answer is not None else text
    if answer is None:
        shown = ", ".join(sorted(str(name) for name in record)) or "nothing"
        raise DataError(f"{shown} hold neither messages nor a caption; add them, or name columns for the source")
    reply = {"type": "text", "text": answer.strip()}
    if not parts and question is None:
        return Sample(key=key, kind="text", messages=({"role": "text", "content": [reply]},))
    if question is not None:
        parts.append({"type": "text", "text": question.strip()})
    kind = "caption" if question is None else "question"
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": [reply]})
    return Sample(key=key, kind=kind, messages=messages, media=media)


def _part(kind: str, value: Any, media: dict[str, bytes], load: MediaLoader) -> dict[str, Any]:
    name, raw = load(value, kind)
    while name in media and media[name] != raw:
        name = f"{len(media)}-{name}"
    media[name] = raw
    return {"type": kind, "media": name}


def _listed(record: Mapping[str, Any], kind: str) -> list[Any]:
    found: list[Any] = []
    for field in FIELDS[kind]:
        value = record.get(field)
        if value is not None:
            found += list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    return found


def _text(record: Mapping[str, Any], what: str) -> str | None:
    for field in FIELDS[what]:
        value = record.get(field)
        if isinstance(value, bytes):
            value = utf8(value, field)
        if isinstance(value, str):
            return value
    return None


def utf8(raw: bytes, name: str) -> str:
    """Text of bytes.

    Raises:
        DataError: they are no UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"its {name} is not UTF-8 (byte {error.start}); write it in UTF-8") from error
