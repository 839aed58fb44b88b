"""One client's session: its events in, the conversation's events out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from omni_ray.config.serving import ServingConfig
from omni_ray.inference.vad import VoiceActivity
from omni_ray.observability.events import emit as log
from omni_ray.types.errors import RequestError
from pipelines.serving.errors import ApiError
from pipelines.serving.metrics import Metrics
from pipelines.serving.realtime.answers import Answers
from pipelines.serving.realtime.client_events import ClientEvent, EventError, audio_of, read_event
from pipelines.serving.realtime.context import Template
from pipelines.serving.realtime.dialogue import Dialogue
from pipelines.serving.realtime.items import Item, new_id
from pipelines.serving.realtime.messages import MessageReader
from pipelines.serving.realtime.outbox import Outbox
from pipelines.serving.realtime.settings import Settings, audio_format, modalities, most_tokens
from pipelines.serving.realtime.transcripts import transcribe
from pipelines.serving.realtime.turns import Turns
from pipelines.serving.stages import Stages

MOST_ERRORS = 200
"""Events that cannot be followed, after which a client is taken for broken."""
MOST_ITEMS = 2000
OVERSHOOT_MS = 1000
"""A client's guess of what it played may lie so far beyond what it was sent; it is taken as all of it."""
_BETA_NAMES = {
    "response.output_audio.": "response.audio.",
    "response.output_audio_transcript.": "response.audio_transcript.",
    "response.output_text.": "response.text.",
    "conversation.item.added": "conversation.item.created",
}


class Session:
    """Handles events one after another; what takes long runs beside it."""

    def __init__(
        self,
        *,
        stages: Stages,
        template: Template,
        serving: ServingConfig,
        activity: VoiceActivity,
        model: str,
        send: Callable[[str], Awaitable[None]],
        beta: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        self.metrics = metrics or Metrics()
        self.id = new_id("sess")
        self.limits = serving.limits
        self.settings = Settings(model, serving.turn, self.id, beta)
        self.outbox = Outbox(send, serving.limits.slow_reader_s)
        self.dialogue = Dialogue(self.id, stages, template, template.model.language.max_position_embeddings)
        seed, most = secrets.randbits(40), serving.limits.max_tokens
        self.answers = Answers(self.dialogue, self.settings, self.outbox, self.tell, self._spoken, seed, most)
        self.turns = Turns(self.dialogue, self.answers, self.settings, activity, self.tell)
        self.turns.on_commit = self._committed
        self.dialogue.on_failure = self._failed
        self.reader = MessageReader(self.dialogue, serving.limits)
        self.errors = 0
        self.last_event = time.monotonic()
        self._handlers = self._table()

    def _table(self) -> dict[str, Callable[[ClientEvent], Any]]:
        """What follows each event."""
        return {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": lambda event: self.turns.commit(),
            "input_audio_buffer.clear": lambda event: self.turns.clear(),
            "input_video_buffer.append": self._frame,
            "conversation.item.create": self._create,
            "conversation.item.retrieve": self._retrieve,
            "conversation.item.delete": self._delete,
            "conversation.item.truncate": self._truncate,
            "response.create": self._respond,
            "response.cancel": self._cancel,
            "output_audio_buffer.clear": lambda event: self.answers.cancel("client_cancelled"),
        }

    def open(self) -> None:
        """The first event."""
        self.tell({"type": "session.created", "session": self.settings.wire()})

    async def handle(self, text: str) -> None:
        """Follow one frame of the client, or answer it with an error event."""
        self.last_event = time.monotonic()
        event_id = None
        try:
            event = read_event(text)
            event_id = event.event_id
            done = self._handlers[event.type](event)
            if asyncio.iscoroutine(done):
                await done
        except EventError as error:
            event_id = event_id or getattr(error, "event_id", None)
            self._refuse(str(error), event_id, error.param, error.code, error.kind)
        except ApiError as error:
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
            self._refuse(str(error), event_id, error.param, error.code, kind)
        except RequestError as error:
            self._refuse(str(error), event_id)

    async def close(self) -> None:
        """Free everything."""
        await self.dialogue.close()

    def tell(self, event: Mapping[str, Any]) -> None:
        """Queue a server event, in the names that this client knows."""
        if event["type"] == "response.done":
            self.metrics.responses.labels(event["response"]["status"]).inc()
        if not self.settings.beta:
            self.outbox.put(event)
            return
        kind = event["type"]
        if kind == "conversation.item.done":
            return
        for name, beta in _BETA_NAMES.items():
            if kind.startswith(name):
                kind = beta + kind[len(name) :]
                break
        self.outbox.put({**event, "type": kind})

    def _refuse(
        self,
        words: str,
        event_id: str | None,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        self.errors += 1
        self.metrics.errors.inc()
        body = {"type": kind, "code": code, "message": words, "param": param, "event_id": event_id}
        self.tell({"type": "error", "error": body})

    def _update(self, event: ClientEvent) -> None:
        given = event.body["session"]
        before = self.settings.body["instructions"]
        self.settings.update(given, spoken=self.answers.any_done)
        if self.settings.body["instructions"] != before:
            self.dialogue.instruct(self.settings.body["instructions"] or "")
        self.turns.configure()
        self.tell({"type": "session.updated", "session": self.settings.wire()})

    def _append(self, event: ClientEvent) -> None:
        self.turns.hear(audio_of(event.body))

    async def _frame(self, event: ClientEvent) -> None:
        if not self.settings.opted("video"):
            raise EventError(
                "input_video_buffer.append is an extension; set session.omni.video to true, or send input_image items",
                "type",
                "unknown_event",
            )
        frame = await asyncio.to_thread(self.reader.frame, event.body["image"])
        self.turns.look(frame, max(0, int(event.body["ts_ms"])))

    def _create(self, event: ClientEvent) -> None:
        if len(self.dialogue.conversation.items) >= MOST_ITEMS:
            raise EventError(f"the conversation holds {MOST_ITEMS} items; delete some", code="too_many_items")
        item, build = self.reader.read(event.body["item"], self.settings.input_format)
        after = event.body.get("previous_item_id")
        if after is not None and not isinstance(after, str):
            raise EventError("previous_item_id must be a text", "previous_item_id", "invalid_type")
        previous = self.dialogue.conversation.add(item, after)
        self.dialogue.do(lambda: self._build(item, build, event.event_id))
        for kind in ("conversation.item.added", "conversation.item.done"):
            self.tell({"type": kind, "previous_item_id": previous, "item": item.wire()})

    def _failed(self, error: BaseException) -> None:
        """Work failed that no response stands for: never in silence."""
        told = isinstance(error, ApiError)
        words = str(error) if told else "the server failed on what was sent last"
        code = getattr(error, "code", None) if told else "internal_error"
        body = {"type": "server_error", "code": code, "message": words, "param": None, "event_id": None}
        self.tell({"type": "error", "error": body})

    async def _build(self, item: Item, build: Callable[[], Awaitable[None]], event_id: str | None) -> None:
        try:
            await build()
        except (ApiError, EventError) as error:
            if isinstance(error, ApiError) and error.status >= 500:
                item.failure = error
            self._refuse(str(error), event_id, "item", getattr(error, "code", None))

    def _retrieve(self, event: ClientEvent) -> None:
        item_id = event.body["item_id"]
        if item_id not in self.dialogue.conversation:
            raise EventError(f"there is no item {item_id[:80]!r}", "item_id", "item_retrieve_invalid_item_id")
        self.tell({"type": "conversation.item.retrieved", "item": self.dialogue.conversation.find(item_id).wire()})

    def _delete(self, event: ClientEvent) -> None:
        item_id = event.body["item_id"]
        if item_id not in self.dialogue.conversation:
            raise EventError(f"there is no item {item_id[:80]!r}", "item_id", "item_delete_invalid_item_id")
        if self.answers.active is not None and self.answers.active.item.id == item_id:
            self.answers.cancel("client_cancelled")
        self.dialogue.conversation.remove(item_id)
        self.tell({"type": "conversation.item.deleted", "item_id": item_id})

    def _truncate(self, event: ClientEvent) -> None:
        item_id, end_ms = event.body["item_id"], event.body["audio_end_ms"]
        if item_id not in self.dialogue.conversation:
            raise EventError(f"there is no item {item_id[:80]!r}", "item_id", "item_truncate_invalid_item_id")
        active = self.answers.active
        if active is not None and active.item.id == item_id and not active.over:
            self.answers.cancel("client_cancelled")
        item = self.dialogue.conversation.find(item_id)
        if item.spoken is None or not item.spoken.voice:
            raise EventError("only spoken answers of the assistant can be truncated", "item_id", "invalid_item")
        index = event.body.get("content_index", 0)
        if index != 0:
            raise EventError(f"content_index is {index!r:.20}; an answer has one part, 0", "content_index")
        sent_ms = item.spoken.audio_ms
        if end_ms < 0 or end_ms > sent_ms + OVERSHOOT_MS:
            raise EventError(
                f"audio_end_ms is {end_ms}, yet the item has {sent_ms:.0f} ms of sound",
                "audio_end_ms",
                "invalid_audio_end_ms",
            )
        self.answers.truncate(item, float(end_ms))
        self.tell(
            {"type": "conversation.item.truncated", "item_id": item_id, "content_index": 0, "audio_end_ms": end_ms}
        )

    def _respond(self, event: ClientEvent) -> None:
        given = self._response_settings(event.body.get("response") or {})
        items = [
            self.reader.read(part, self.settings.input_format, self.dialogue.conversation)
            for part in given.pop("input", [])
        ]
        apart = given.pop("conversation", "auto") == "none"
        if apart:

            async def begin() -> None:
                for _, build in items:
                    await build()
                chosen = [item for item, _ in items] if items else list(self.dialogue.conversation.items)
                self.answers.begin_apart(given, chosen)

            self.dialogue.do(begin)
            return
        if self.answers.active is not None:
            if not self.answers.active.over:
                raise EventError(
                    "a response is in progress; cancel it, or wait for response.done",
                    code="conversation_already_has_active_response",
                )
            self.answers.active = None
        for item, build in items:
            self.dialogue.conversation.add(item)
            self.dialogue.do(build)
        self.answers.release(self.answers.begin(None, given))
        self.turns.answering()

    def _response_settings(self, body: Any) -> dict[str, Any]:
        if not isinstance(body, Mapping):
            raise EventError("response must be an object", "response")
        given: dict[str, Any] = {}
        for name in ("output_modalities", "modalities"):
            if name in body:
                given["output_modalities"] = modalities(body[name], f"response.{name}")
        for name in ("max_output_tokens", "max_response_output_tokens"):
            if body.get(name) is not None:
                given["max_output_tokens"] = most_tokens(body[name], f"response.{name}")
        if isinstance(body.get("instructions"), str):
            given["instructions"] = body["instructions"]
        metadata = body.get("metadata")
        if metadata is not None:
            if (
                not isinstance(metadata, Mapping)
                or len(metadata) > 16
                or not all(
                    isinstance(k, str) and isinstance(v, str) and len(k) <= 64 and len(v) <= 512
                    for k, v in metadata.items()
                )
            ):
                raise EventError(
                    "metadata may hold 16 texts of up to 512 characters under names of up to 64", "response.metadata"
                )
            given["metadata"] = dict(metadata)
        output = body.get("audio", {}).get("output", {}) if isinstance(body.get("audio"), Mapping) else {}
        if isinstance(output, Mapping) and output.get("format") is not None:
            given["format"] = audio_format(output["format"], "response.audio.output.format")
        conversation = body.get("conversation", "auto")
        if conversation not in ("auto", "none"):
            raise EventError("response.conversation must be auto or none", "response.conversation")
        given["conversation"] = conversation
        parts = body.get("input") or []
        if not isinstance(parts, list):
            raise EventError("response.input must be a list of items", "response.input")
        given["input"] = parts
        return given

    def _cancel(self, event: ClientEvent) -> None:
        wanted = event.body.get("response_id")
        stopped = self.answers.cancel("client_cancelled", wanted if isinstance(wanted, str) else None)
        # A response that has just ended is cancelled too late by every client now and then; that is no error.
        if not stopped and not self.answers.any_done:
            raise EventError("there is no response to cancel", "response_id", "response_cancel_not_active")
        if stopped:
            self.turns.spoken()

    def _spoken(self) -> None:
        self.turns.spoken()

    def _committed(self, item: Item, closing: asyncio.Task[None]) -> None:
        if self.settings.body["audio"]["input"]["transcription"] is not None:
            # Beside the answer, which must not wait for it.
            name = f"{self.id}.heard.{item.id}"
            self.dialogue.beside(transcribe(self.dialogue, name, item, closing, self.tell))

    def note(self) -> None:
        """One line of numbers about the session, nobody's words."""
        self.metrics.rollbacks.inc(self.turns.rollbacks)
        self.metrics.wasted.inc(self.answers.wasted_rows)
        log(
            "session_closed",
            items=len(self.dialogue.conversation.items),
            responses=self.answers.number,
            rollbacks=self.turns.rollbacks,
            rebuilt=self.dialogue.recovered,
            errors=self.errors,
            sent_bytes=self.outbox.sent_bytes,
        )
