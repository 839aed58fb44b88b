"""One response: generated rows become words and sound, and those become events; unseen until it is released."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, AUDIO_RESERVED, NUM_CODEBOOKS
from pipelines.serving.realtime.items import FRAME_MS, Item, Spoken, new_id
from pipelines.serving.resume import Voice
from pipelines.serving.sound import Format, SoundWriter
from pipelines.serving.stages import AnswerRows, Stages

DELTA_BYTES = 24_000
"""Most bytes of sound in one delta: half a second of pcm16, 32 kB in base64."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextReader:
    """Ids to text as they come; a character whose bytes are not all there waits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Text that this id adds."""
        if token in self._special:
            return self.flush()
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        if text.endswith(REPLACEMENT) and len(self._waiting) < 4:
            return ""
        self._waiting = []
        return text

    def flush(self) -> str:
        """What waits, however broken."""
        text = self._tokenizer.decode(self._waiting) if self._waiting else ""
        self._waiting = []
        return text


class FrameReader:
    """Rows to codec frames as they become whole: row t has the semantic id of frame t + 1 and the others of frame t."""

    def __init__(self) -> None:
        self._semantic: int | None = None
        self._row = -1
        self.frame_rows: list[int] = []
        """Row in which each frame began."""

    def push(self, row_5: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Codes [4] of the frame that this row completes, if any."""
        self._row += 1
        frame = None
        if self._semantic is not None and int(row_5[2]) >= AUDIO_RESERVED:
            codes = [self._semantic, *(int(code) for code in row_5[2:])]
            frame = np.array(codes, np.int64) - AUDIO_RESERVED
        semantic = int(row_5[1])
        self._semantic = semantic if semantic not in (AUDIO_EOS, AUDIO_PAD) else None
        if self._semantic is not None:
            self.frame_rows.append(self._row)
        return frame


@dataclass(slots=True)
class Timing:
    """Places on the clock of one response, seconds of the monotonic clock; 0 where nothing happened."""

    asked: float = 0.0
    """Generation was asked for (t3, or t4 without speculation)."""
    turn_end: float = 0.0
    """t4, or the client's request."""
    first_row: float = 0.0
    first_sound: float = 0.0
    first_out: float = 0.0
    ended: float = 0.0


@dataclass(slots=True)
class Answered:
    """What a response has produced so far."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished: bool = False
    """The model ended the answer itself."""
    sent_bytes: int = 0
    """Sound in the client's format."""


class Response:
    """A response in progress.

    ``emit`` receives events in order; before :meth:`release` they are held back.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        voice: bool,
        form: Format,
        session: str,
        number: int,
        facts: Mapping[str, Any],
        emit: Callable[[Mapping[str, Any]], None],
        room: Callable[[], Any],
    ) -> None:
        """``facts``: fields of the response object that stay as they are: conversation_id, metadata, audio, ..."""
        self.id, self.item = new_id("resp"), Item(id=new_id("item"), role="assistant", status="in_progress")
        self.voice, self.form, self.facts = voice, form, dict(facts)
        self._decoder = Voice(session, number)
        self._emit_now, self._room = emit, room
        self._held: list[Mapping[str, Any]] | None = []
        self._text, self._frames, self._writer = TextReader(tokenizer), FrameReader(), SoundWriter(form)
        self.done = Answered()
        self.timing = Timing()
        self.status = "in_progress"
        self.details: dict[str, Any] | None = None
        self.prompt_rows: dict[str, int] = {}
        self.cached_rows = 0
        self.previous_item_id: str | None = None

    @property
    def released(self) -> bool:
        """Whether the client sees it."""
        return self._held is None

    @property
    def over(self) -> bool:
        """Whether its last event was made."""
        return self.status != "in_progress"

    def release(self, previous_item_id: str | None) -> None:
        """Show it: the opening events, then what was made meanwhile."""
        held, self._held = self._held or [], None
        self.previous_item_id = previous_item_id
        self._opening(previous_item_id)
        for event in held:
            self._out(event)

    async def take(self, part: AnswerRows, stages: Stages) -> None:
        """Turn generated rows into events."""
        if not self.timing.first_row:
            self.timing.first_row = time.monotonic()
        codes = []
        for row_5 in part.ids_R5:
            self.done.rows.append(row_5)
            piece = self._text.push(int(row_5[0]))
            self.done.pieces.append(piece)
            if piece:
                self._emit(self._words_event("delta", piece))
            frame = self._frames.push(row_5)
            if frame is not None:
                codes.append(frame)
        self.done.finished = self.done.finished or part.ended
        if self.voice and (codes or (part.ended and self._decoder.begun)):
            await self._sound(codes, part.ended, stages)

    async def finish_sound(self, stages: Stages) -> None:
        """The answer was cut at its longest: what the decoder still holds."""
        if self.voice and not self.done.finished and self._decoder.begun:
            await self._sound([], True, stages)

    def finish(self, status: str, reason: str | None = None, error: Mapping[str, Any] | None = None) -> None:
        """The last events; afterwards ``item`` stands as the history keeps it, rows left out."""
        if self.over:
            return
        self.status = status
        self.timing.ended = time.monotonic()
        if status != "completed":
            self.details = {"type": status, "reason": reason, "error": dict(error) if error else None}
            self.details = {name: value for name, value in self.details.items() if value is not None}
        rest = self._text.flush()
        if rest and self.done.pieces:
            self.done.pieces[-1] += rest
            self._emit(self._words_event("delta", rest))
        ids_R5 = np.stack(self.done.rows) if self.done.rows else np.zeros((0, 1 + NUM_CODEBOOKS), np.int64)
        sent_ms = self.form.ms(self.done.sent_bytes)
        frames = self._frames.frame_rows if self.voice else []
        spoken = Spoken(self.voice, ids_R5, list(self.done.pieces), frames, sent_ms)
        if status == "cancelled":
            rows = spoken.rows_until(sent_ms) if self.voice else len(spoken.pieces)
            spoken = spoken.cut(rows)
            spoken.audio_ms = sent_ms  # a client may still truncate to anything it was sent
        self.item.spoken = spoken
        self.item.status = "completed" if status == "completed" else "incomplete"
        self.item.content = [self._part(spoken.text)]
        self._closing("".join(self.done.pieces).strip())

    def wire(self, usage: bool = True) -> dict[str, Any]:
        """The response object."""
        body = {
            "id": self.id,
            "object": "realtime.response",
            "status": self.status,
            "status_details": self.details,
            "output": [self.item.wire()] if self.over else [],
            **self.facts,
            "usage": self.usage() if usage and self.over else None,
        }
        return body

    def usage(self) -> dict[str, Any]:
        """Rows in and out; a row is a token."""
        spoken = sum(int((row[1:] != AUDIO_PAD).any()) for row in self.done.rows)
        made, read = len(self.done.rows), sum(self.prompt_rows.values())
        return {
            "total_tokens": read + made,
            "input_tokens": read,
            "output_tokens": made,
            "input_token_details": {
                "text_tokens": self.prompt_rows.get("text", 0),
                "audio_tokens": self.prompt_rows.get("audio", 0),
                "image_tokens": self.prompt_rows.get("image", 0),
                "cached_tokens": self.cached_rows,
                "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 0, "image_tokens": 0},
            },
            "output_token_details": {"text_tokens": made - spoken, "audio_tokens": spoken},
        }

    async def _sound(self, codes: list[NDArray[np.int64]], final: bool, stages: Stages) -> None:
        wave_S = await self._decoder.say(codes, final, stages)
        raw = self._writer.push(wave_S) + (self._writer.flush() if final else b"")
        if raw and not self.timing.first_sound:
            self.timing.first_sound = time.monotonic()
        for start in range(0, len(raw), DELTA_BYTES):
            if self.released:
                await self._room()
            piece = raw[start : start + DELTA_BYTES]
            self._emit(self._event("output_audio.delta", delta=base64.b64encode(piece).decode(), _bytes=len(piece)))

    def _emit(self, event: Mapping[str, Any]) -> None:
        if self._held is not None:
            self._held.append(event)
        else:
            self._out(event)

    def _out(self, event: Mapping[str, Any]) -> None:
        if "_bytes" in event:
            self.done.sent_bytes += event["_bytes"]
            if not self.timing.first_out:
                self.timing.first_out = time.monotonic()
            event = {name: value for name, value in event.items() if name != "_bytes"}
        elif event["type"] == "response.done":
            event = {"type": "response.done", "response": self.wire()}
        elif event["type"] == "conversation.item.done":
            event = {**event, "previous_item_id": self.previous_item_id}
        self._emit_now(event)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}
        return {"type": f"response.{kind}", **place, **fields}

    def _words_event(self, ending: str, words: str) -> dict[str, Any]:
        kind = "output_audio_transcript" if self.voice else "output_text"
        name = "delta" if ending == "delta" else ("transcript" if self.voice else "text")
        return self._event(f"{kind}.{ending}", **{name: words})

    def _part(self, words: str) -> dict[str, Any]:
        return {"type": "output_audio", "transcript": words} if self.voice else {"type": "output_text", "text": words}

    def _stream_part(self, words: str) -> dict[str, Any]:
        """Parts of content_part events have names of their own."""
        return {"type": "audio", "transcript": words} if self.voice else {"type": "text", "text": words}

    def _opening(self, previous_item_id: str | None) -> None:
        begun = {**self.wire(), "status": "in_progress", "status_details": None, "output": [], "usage": None}
        item = self.item.wire() | {"status": "in_progress", "content": []}
        self._out({"type": "response.created", "response": begun})
        self._out({"type": "response.output_item.added", "response_id": self.id, "output_index": 0, "item": item})
        if self.facts["conversation_id"] is not None:
            self._out({"type": "conversation.item.added", "previous_item_id": previous_item_id, "item": item})
        self._out(self._event("content_part.added", part=self._stream_part("")))

    def _closing(self, said: str) -> None:
        if self.voice:
            self._emit(self._event("output_audio.done"))
        self._emit(self._words_event("done", said))
        self._emit(self._event("content_part.done", part=self._stream_part(said)))
        item = self.item.wire()
        self._emit({"type": "response.output_item.done", "response_id": self.id, "output_index": 0, "item": item})
        if self.facts["conversation_id"] is not None:
            self._emit({"type": "conversation.item.done", "previous_item_id": self.previous_item_id, "item": item})
        self._emit({"type": "response.done"})

    @property
    def heard_until(self) -> float:
        """When the client will have played all that was sent, on the monotonic clock."""
        return self.timing.first_out + self.form.ms(self.done.sent_bytes) / 1000

    def statistics(self) -> dict[str, float]:
        """Milliseconds between the places on the clock, for clients that asked for them."""
        t = self.timing
        pairs = {
            "asked_to_first_row_ms": (t.asked, t.first_row),
            "asked_to_first_sound_ms": (t.asked, t.first_sound),
            "turn_end_to_first_out_ms": (t.turn_end, t.first_out),
        }
        return {name: round(1000 * (b - a), 2) for name, (a, b) in pairs.items() if a and b}


FRAMES_A_SECOND = 1000 / FRAME_MS
