"""What the sessions of the chaos bench say, and what befalls them: drawn from a seed and the session's number alone."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.bench.serve_material import PHRASES, quiet, speech

KINDS = ("text", "picture", "push_to_talk", "hands_free")
FAULTS = ("reset", "half_open", "slow_reader", "garbage")
FAULTY_SHARE = 0.4
ROWS = 16
"""Rows of an answer: a second of sound."""
SLOW_ROWS = 300
"""Of an answer to a slow reader: 18 s of sound, far more than the systems on the way hold."""
WAVES = 6
PIECE = 4800
"""Samples of one append: 200 ms."""
GARBAGE: tuple[bytes | str, ...] = (
    b"\x00\x01\x02\xff" * 64,
    "{",
    '{"type": "no.such.event", "event_id": "strange"}',
    '{"type": "input_audio_buffer.append", "audio": "***"}',
    '{"type": "input_audio_buffer.append"}',
    '{"type": "conversation.item.delete", "item_id": "item_of_nobody"}',
    "[" * 5000,
    "null",
    '{"type": "session.update", "session": {"type": "realtime", "output_modalities": ["smell"]}}',
)
"""Frames that are answered with an error event each and change nothing."""


@dataclass(frozen=True, slots=True)
class Script:
    """One session."""

    number: int
    kind: str
    """How the first turn is given; the second is written."""
    words: tuple[str, str]
    wave: int
    colour: int
    fault: str
    """One of :data:`FAULTS`, or empty."""
    moment: int
    """Server events after which the fault comes."""
    garbage: tuple[int, ...]
    """Which garbage is sent."""
    utf8: bool
    """Whether the garbage ends with a text frame that is no text, after which the connection may end."""


def script(number: int, seed: int, faults: bool) -> Script:
    """The session of this number; ``faults`` False: what it says when nothing befalls it."""
    draws = np.random.default_rng([seed, number])
    kind = KINDS[int(draws.integers(len(KINDS)))]
    first, second = (PHRASES[int(draws.integers(len(PHRASES)))] for _ in range(2))
    wave, colour = int(draws.integers(WAVES)), int(draws.integers(256))
    befallen = np.random.default_rng([seed, number, 1])
    fault = FAULTS[int(befallen.integers(len(FAULTS)))] if befallen.random() < FAULTY_SHARE else ""
    moment = int(befallen.integers(1, 40))
    garbage = tuple(int(i) for i in befallen.integers(len(GARBAGE), size=int(befallen.integers(1, 6))))
    utf8 = bool(befallen.random() < 0.3)
    return Script(
        number, kind, (f"{first} {number}", second), wave, colour, fault if faults else "", moment, garbage, utf8
    )


def settings(kind: str, fault: str) -> dict[str, Any]:
    """The session's settings."""
    detection = {"type": "server_vad"} if kind == "hands_free" else None
    rows = SLOW_ROWS if fault == "slow_reader" else ROWS
    return {"type": "realtime", "max_output_tokens": rows, "audio": {"input": {"turn_detection": detection}}}


def first_turn(one: Script) -> tuple[list[dict[str, Any]], bool]:
    """Client events, and whether they end with a request for the answer."""
    if one.kind in ("push_to_talk", "hands_free"):
        appends = [{"type": "input_audio_buffer.append", "audio": piece} for piece in sound(one.wave)]
        if one.kind == "hands_free":
            return appends, False
        return [*appends, {"type": "input_audio_buffer.commit"}, {"type": "response.create"}], True
    content: list[dict[str, Any]] = [{"type": "input_text", "text": one.words[0]}]
    if one.kind == "picture":
        content.insert(0, {"type": "input_image", "image_url": picture(one.colour)})
    return written(content), True


def second_turn(one: Script) -> list[dict[str, Any]]:
    """Client events of a written question."""
    return written([{"type": "input_text", "text": one.words[1]}])


def written(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A message and the request for its answer."""
    item = {"type": "message", "role": "user", "content": content}
    return [{"type": "conversation.item.create", "item": item}, {"type": "response.create"}]


@functools.cache
def sound(wave: int) -> tuple[str, ...]:
    """Speech between quiet, in pieces of base64."""
    samples = np.concatenate([quiet(0.3, wave), speech(1.3, wave), quiet(1.1, wave)])
    raw = samples.astype("<i2")
    return tuple(base64.b64encode(raw[i : i + PIECE].tobytes()).decode() for i in range(0, len(raw), PIECE))


@functools.cache
def picture(colour: int) -> str:
    """A square."""
    pixels = np.full((56, 56, 3), 40, np.uint8)
    pixels[14:42, 14:42] = (colour, 255 - colour, 90)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
