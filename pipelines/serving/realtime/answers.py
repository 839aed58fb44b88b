"""The life of responses: begun seen or unseen, released, cancelled, and what stays of them in the history."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from omni_ray.observability.events import emit as log
from pipelines.serving.errors import ApiError
from pipelines.serving.realtime.context import Block
from pipelines.serving.realtime.dialogue import Dialogue
from pipelines.serving.realtime.items import Item
from pipelines.serving.realtime.outbox import Outbox
from pipelines.serving.realtime.settings import Settings, format_of
from pipelines.serving.realtime.speaking import FRAMES_A_SECOND, Response
from pipelines.serving.resume import answer_alone
from pipelines.serving.stages import AnswerOptions, Rows

BURST_S = 2.0
"""Sound made ahead of the client's ear; beyond it generation keeps the pace of speech."""
DEFAULT_TOKENS = 512


class Answers:
    """Responses of one session; in the default conversation one at a time."""

    def __init__(
        self,
        dialogue: Dialogue,
        settings: Settings,
        outbox: Outbox,
        emit: Callable[[Mapping[str, Any]], None],
        on_spoken: Callable[[], None],
        seed: int,
        most_tokens: int,
    ) -> None:
        self.dialogue, self.settings, self.outbox = dialogue, settings, outbox
        self.emit, self._on_spoken, self.seed = emit, on_spoken, seed
        self._most_tokens = most_tokens
        self.active: Response | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._apart: dict[str, Response] = {}
        self._answers: dict[str, Block] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.number = 0
        self.wasted_rows = 0
        """Rows of speculation that were thrown away."""
        self.any_done = False

    @property
    def busy(self) -> bool:
        """Whether an answer of the conversation is still being made; one that is only still heard makes room."""
        return self.active is not None and not self.active.over

    def begin(self, unseen: Item | None = None, given: Mapping[str, Any] | None = None) -> Response:
        """Begin to answer the conversation; nothing is seen before :meth:`release`.

        Args:
            unseen: A turn that is answered although it may yet go on, and stands in the conversation when it has ended.
            given: Settings of this response alone.
        """
        response = self._make(given or {}, self.dialogue.session, self.dialogue.conversation.id)
        self._end_timer()
        self.active = response
        response.timing.asked = time.monotonic()

        async def work() -> None:
            answering = self.dialogue.template.answering(response.voice)
            most = self._most(given or {})
            failure = next((i.failure for i in self._asked(unseen) if i.failure is not None), None)
            if failure is not None:  # what the user said never came to be rows: it cannot be answered
                self._end_failed(response, failure)
                return
            ended = unseen is None or unseen.id in self.dialogue.conversation
            tail = [] if ended or unseen is None else unseen.blocks
            wanted = self.dialogue.history(most, [*tail, answering], instructions=(given or {}).get("instructions"))
            await self._run(response, wanted, answering, most)

        self._tasks[response.id] = self.dialogue.do(work)
        return response

    def release(self, response: Response, turn_end: float | None = None) -> None:
        """Let the client see it."""
        response.timing.turn_end = turn_end or time.monotonic()
        last = self.dialogue.conversation.last_id
        self.dialogue.conversation.add(response.item)
        response.release(last)
        if response.over:
            self._spoken_later(response)

    def begin_apart(self, given: Mapping[str, Any], items: Sequence[Item]) -> Response:
        """A response outside the conversation; others may run beside it."""
        self.number += 1
        name = f"{self.dialogue.session}.{self.number}"
        response = self._make(given, name, None)
        self._apart[response.id] = response
        response.timing.asked = response.timing.turn_end = time.monotonic()
        response.release(items[-1].id if items else None)

        async def work() -> None:
            most = self._most(given)
            answering = self.dialogue.template.answering(response.voice)
            wanted = self.dialogue.history(most, [answering], items, given.get("instructions"))
            rows = Rows.joined([block.rows for block in wanted])
            try:
                response.prompt_rows = _counts(wanted)
                stages = self.dialogue.stages
                async with aclosing(answer_alone(stages, name, rows, self._options(response, most))) as parts:  # type: ignore[type-var]
                    async for part in parts:
                        await response.take(part, stages)
                await response.finish_sound(stages)
                self._finish(response)
            except Exception as error:  # whatever it was, the client must hear of it
                response.finish("failed", error=_error(error))
            finally:
                self._apart.pop(response.id, None)
                self.dialogue.stages.forget(name)

        self._tasks[response.id] = self.dialogue.beside(work())
        return response

    def cancel(self, reason: str, response_id: str | None = None) -> bool:
        """Stop a response; its history ends at the last punctuation that was sent. Whether there was one."""
        response = self._apart.get(response_id or "") or self.active
        if response is None or (response_id is not None and response.id != response_id):
            return False
        if response is self.active:
            self._end_timer()
        was_over = response.over
        response.finish("cancelled", reason)
        task = self._tasks.get(response.id)
        if task is not None:
            task.cancel()
        if response is self.active:
            self.active = None
            if not was_over:
                self._settle(response)
        return not was_over

    def drop(self, response: Response) -> None:
        """Forget an unseen response (rollback)."""
        self.wasted_rows += len(response.done.rows)
        task = self._tasks.get(response.id)
        if task is not None:
            task.cancel()
        response.finish("cancelled", "turn_detected")
        if response is self.active:
            self.active = None

    def truncate(self, item: Item, audio_end_ms: float) -> None:
        """Keep of an answer what was heard."""
        assert item.spoken is not None
        before = item.spoken
        item.spoken = before.cut(before.rows_until(audio_end_ms))
        item.content = [{**item.content[0], "transcript" if before.voice else "text": item.spoken.text}]
        self._store(item, False)

    async def _run(self, response: Response, wanted: list[Block], answering: Block, most: int) -> None:
        dialogue = self.dialogue
        response.prompt_rows = _counts(wanted)
        response.cached_rows = dialogue.view.difference(wanted)[0]
        made = Block(Rows.of_text([]))
        self._answers[response.item.id] = answering
        try:
            async with aclosing(dialogue.generate(wanted, self._options(response, most))) as parts:  # type: ignore[type-var]
                async for part in parts:
                    await response.take(part, dialogue.stages)
            await response.finish_sound(dialogue.stages)
            self._finish(response)
        except Exception as error:  # whatever it was, the client must hear of it
            response.finish("failed", error=_error(error))
        finally:
            self._tasks.pop(response.id, None)
            if response.done.rows and response.item.spoken is not None:
                # The row that came last may not have been fed back yet.
                made = Block(Rows(ids_T5=response.item.spoken.ids_R5))
                dialogue.view.holds_part(made, min(len(made), len(response.done.rows) - 1))
            if response is self.active:
                self._settle(response, made)
                if response.released:
                    self._spoken_later(response)
            elif response.item.id in dialogue.conversation:
                self._settle(response, made)

    def _asked(self, unseen: Item | None) -> list[Item]:
        """What the user has said since the last answer."""
        said: list[Item] = [] if unseen is None else [unseen]
        for item in reversed(self.dialogue.conversation.items):
            if item.role == "assistant" and item.spoken is not None:
                break
            said.append(item)
        return said

    def _end_failed(self, response: Response, error: ApiError) -> None:
        self._tasks.pop(response.id, None)
        response.finish("failed", error=_error(error))
        if response is self.active and response.released:
            self._spoken_later(response)

    def _finish(self, response: Response) -> None:
        if response.done.finished:
            response.finish("completed")
        else:
            response.finish("incomplete", "max_output_tokens")

    def _settle(self, response: Response, made: Block | None = None) -> None:
        """Put a finished answer's rows into the history."""
        self.any_done = True
        if response.item.spoken is not None:
            finished = response.done.finished and response.status == "completed"
            self._store(response.item, finished, made)

    def _store(self, item: Item, ended: bool, made: Block | None = None) -> None:
        spoken = item.spoken
        assert spoken is not None
        answering = self._answers.get(item.id)
        if answering is None or not len(spoken.ids_R5):
            item.blocks = []
            return
        rows = made
        if rows is None or len(rows) != len(spoken.ids_R5):
            old = next((b for b in item.blocks[1:2]), None)
            rows = Block(Rows(ids_T5=spoken.ids_R5))
            if old is not None:
                self.dialogue.view.shortened(old, rows)
        closing = self.dialogue.template.answered(spoken.ids_R5, ended, spoken.voice)
        item.blocks = [answering, rows, *closing]

    def _spoken_later(self, response: Response) -> None:
        """The client hears longer than it is sent; the conversation turns when it has heard all."""
        left = max(0.0, response.heard_until - time.monotonic()) if response.done.sent_bytes else 0.0

        def spoken() -> None:
            self._timer = None
            if self.active is response:
                self.active = None
            self._on_spoken()

        self._end_timer()
        self._timer = asyncio.get_running_loop().call_later(left, spoken)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make(self, given: Mapping[str, Any], session: str, conversation: str | None) -> Response:
        self.number += 1
        chosen = given.get("output_modalities", self.settings.body["output_modalities"])
        output = self.settings.body["audio"]["output"]
        facts = {
            "conversation_id": conversation,
            "output_modalities": chosen,
            "max_output_tokens": given.get("max_output_tokens", self.settings.body["max_output_tokens"]),
            "audio": {"output": {"format": given.get("format", output["format"]), "voice": output["voice"]}},
            "metadata": given.get("metadata"),
        }
        response = Response(
            tokenizer=self.dialogue.template.tokenizer,
            voice="audio" in chosen,
            form=format_of(facts["audio"]["output"]["format"]),
            session=session,
            number=self.number,
            facts=facts,
            emit=self._told,
            room=self.outbox.room,
        )
        return response

    def _told(self, event: Mapping[str, Any]) -> None:
        """Add what a client asked for to the last event."""
        if event["type"] == "response.done" and self.settings.opted("statistics"):
            body = dict(event["response"])
            found = self._find(body["id"])
            numbers = {**(found.statistics() if found else {}), "wasted_rows": self.wasted_rows}
            body["metadata"] = {**(body["metadata"] or {}), "omni": json.dumps(numbers)}
            event = {**event, "response": body}
        self.emit(event)

    def _find(self, response_id: str) -> Response | None:
        if self.active is not None and self.active.id == response_id:
            return self.active
        return self._apart.get(response_id)

    def _most(self, given: Mapping[str, Any]) -> int:
        asked = given.get("max_output_tokens", self.settings.body["max_output_tokens"])
        return min(self._most_tokens, DEFAULT_TOKENS if asked == "inf" else int(asked))

    def _options(self, response: Response, most: int) -> AnswerOptions:
        burst = int(BURST_S * FRAMES_A_SECOND) if response.voice else 1 << 30
        return AnswerOptions(
            voice=response.voice,
            max_tokens=most,
            temperature=float(response.facts.get("temperature") or 0.0),
            seed=self.seed + self.number,
            burst_rows=burst,
        )


def _counts(blocks: Sequence[Block]) -> dict[str, int]:
    """Rows by kind."""
    total = sum(map(len, blocks))
    image = sum(len(values) for block in blocks for _, values in block.rows.features if block.image)
    audio = sum(len(values) for block in blocks for _, values in block.rows.features if not block.image)
    return {"text": total - image - audio, "image": image, "audio": audio}


def _error(error: Exception) -> dict[str, Any]:
    """What a client is told; the words of an error that is not meant for it may hold another's."""
    if isinstance(error, ApiError):
        return {"type": "server_error", "code": error.code, "message": str(error)}
    log("response_failed", error=type(error).__name__)
    return {"type": "server_error", "code": "internal_error", "message": "the server failed on this response"}
