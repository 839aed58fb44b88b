"""Turns of a live conversation: packets are prefilled as they come, answers begin unseen and are released."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.inference.frame_sampling import Pair, SamplerState, begin_turn, end_turn, look
from omni_ray.inference.turn import SAMPLE_RATE_HZ, Event, Order, Phase, Sign
from omni_ray.inference.vad import VoiceActivity
from pipelines.serving.errors import ApiError
from pipelines.serving.realtime.answers import Answers
from pipelines.serving.realtime.client_events import EventError
from pipelines.serving.realtime.dialogue import Dialogue
from pipelines.serving.realtime.hearing import PACKET, Ear, LiveTurn
from pipelines.serving.realtime.items import Item
from pipelines.serving.realtime.settings import Settings
from pipelines.serving.realtime.speaking import Response

LEAST_COMMIT_MS = 100
_PER_MS = SAMPLE_RATE_HZ // 1000
Frame = NDArray[np.uint8]


@dataclass(slots=True)
class Attempt:
    """An answer that is being made to a turn which may yet go on."""

    until: int
    """t3."""
    item: Item
    response: Response
    closing: asyncio.Task[None]


class Turns:
    """The turn machine's signs, acted upon."""

    def __init__(
        self,
        dialogue: Dialogue,
        answers: Answers,
        settings: Settings,
        activity: VoiceActivity,
        emit: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.dialogue, self.answers, self.settings, self.emit = dialogue, answers, settings, emit
        self.ear = Ear(settings.input_format, self._config(), activity)
        self.turn: LiveTurn | None = None
        self.attempt: Attempt | None = None
        self.camera: SamplerState[Frame] = SamplerState()
        self._late_frames: list[tuple[Frame, int]] = []
        self._number = 0
        self._committed = 0
        """Sample up to which sound belongs to an item."""
        self.rollbacks = 0
        self.on_commit: Callable[[Item, asyncio.Task[None]], None] = lambda item, closing: None

    def configure(self) -> None:
        """Follow a change of the settings."""
        self.ear.configure(self.settings.input_format, self._config())

    def hear(self, raw: bytes) -> None:
        """Sound of the client."""
        before = self.ear.log.end
        events = self.ear.push(raw, answered=self.attempt is not None)
        if self.settings.detection is None and self.turn is None and self.ear.log.end > before:
            self._begin(max(before, self._committed))
        for event in events:
            self._act(event)
        if self.turn is not None and self.attempt is None:
            self._feed(self.turn, self.ear.log.end)

    def look(self, frame: Frame, ts_ms: int) -> None:
        """A camera's frame, already at the encoder's size."""
        if self.attempt is not None:
            self._late_frames.append((frame, ts_ms))
            return
        self.camera, pairs = look(self.camera, frame, ts_ms)
        if self.turn is not None:
            self._see(self.turn, pairs)

    def commit(self) -> None:
        """The client ends its turn.

        Raises:
            EventError: less than 100 ms of sound since the last commit.
        """
        log = self.ear.log
        have_ms = (log.end - max(self._committed, log.start if self.turn is None else self.turn.start)) / _PER_MS
        if have_ms < LEAST_COMMIT_MS:
            raise EventError(
                f"the input audio buffer holds {have_ms:.0f} ms of sound; a commit needs {LEAST_COMMIT_MS} ms",
                code="input_audio_buffer_commit_empty",
            )
        if self.settings.detection is None:
            assert self.turn is not None
            self._end(self.turn, log.end, answer=False)
            return
        if self.turn is None:
            self._begin(max(self._committed, log.start))
        for event in self.ear.order(Order.COMMIT):
            self._act(event)

    def clear(self) -> None:
        """The client takes its sound back."""
        for event in self.ear.order(Order.CLEAR):
            self._act(event)
        if self.turn is not None:
            self.ear.needed.pop(self.turn.number, None)
        self.turn = None
        self._committed = self.ear.log.end
        self.ear.log.forget(self.ear.log.end)
        self.emit({"type": "input_audio_buffer.cleared"})

    def answering(self) -> None:
        """The client has asked for an answer itself: speech from now on speaks into it."""
        for event in self.ear.order(Order.SPEAK):
            self._act(event)

    def spoken(self) -> None:
        """The answer was heard to its end, or there is none."""
        for event in self.ear.order(Order.SPOKEN):
            self._act(event)

    def _config(self) -> Any:
        return None if self.settings.detection is None else self.settings.turn_config()

    def _act(self, event: Event) -> None:
        if event.sign == Sign.INTERRUPT:
            self._interrupted()
        elif event.sign == Sign.TURN_START:
            start = max(event.at, self.ear.log.start, self._committed)
            turn = self._begin(start)
            at_ms = start // _PER_MS
            self.emit({"type": "input_audio_buffer.speech_started", "audio_start_ms": at_ms, "item_id": turn.item_id})
        elif event.sign == Sign.SPECULATE and self.turn is not None:
            self._speculate(self.turn, event.at)
        elif event.sign == Sign.ROLLBACK:
            self._rollback()
        elif event.sign == Sign.TURN_END and self.turn is not None:
            self._turn_end(self.turn, event)

    def _begin(self, start: int) -> LiveTurn:
        self._number += 1
        self.turn = LiveTurn(self._number, start, self.dialogue.template)
        self.ear.needed[self._number] = start
        self.camera, history = begin_turn(self.camera)
        self._see(self.turn, history)
        return self.turn

    def _feed(self, turn: LiveTurn, until: int) -> None:
        """Cut whole packets and have them encoded and prefilled."""
        while self.settings.streams and until - turn.fed >= PACKET:
            number, start = turn.packets, turn.fed
            turn.packets, turn.fed = number + 1, start + PACKET

            async def work(number: int = number) -> None:
                with contextlib.suppress(ApiError):  # the turn's end hears and reads what is missing
                    await self._hear_until(turn, number + 1)
                    await self.dialogue.sync(self.dialogue.history(0, turn.blocks))

            self.dialogue.do(work)

    async def _hear_until(self, turn: LiveTurn, packets: int) -> None:
        """Rows of all packets before this one, those on which the stage failed before included."""
        for number in range(turn.heard_packets, packets):
            start = turn.start + number * PACKET
            wave_S = self.ear.log.cut(start, start + PACKET)
            values_ND = await self.dialogue.hear(turn, number, wave_S, False, self.ear.log)
            turn.blocks += turn.rows.hear(values_ND)
            turn.heard_packets = number + 1

    def _see(self, turn: LiveTurn, pairs: tuple[Pair[Frame], ...]) -> None:
        for pair in pairs:

            async def work(pair: Pair[Frame] = pair) -> None:
                try:
                    values_ND = await self.dialogue.see(np.stack(pair.frames))
                except ApiError as error:
                    turn.failure = error
                    return
                block = self.dialogue.template.pair(values_ND, pair.time_ms)
                start_ms = turn.start // _PER_MS
                turn.rows.see(max(0, pair.time_ms - start_ms) // 1000, block)

            self.dialogue.do(work)

    def _close(self, turn: LiveTurn, until: int, item: Item) -> asyncio.Task[None]:
        """Encode what is left of the turn up to ``until`` and give the item its rows; may be done again."""
        _, closing = end_turn(self.camera)
        number, start = turn.packets, turn.fed

        async def work() -> None:
            try:
                await rows_of()
            except ApiError as error:  # told by the response that was to answer it
                item.failure = error
            finally:
                if self.turn is not turn:  # otherwise the user may still go on
                    self.ear.needed.pop(turn.number, None)

        async def rows_of() -> None:
            if turn.failure is not None:
                raise turn.failure
            await self._hear_until(turn, number)
            rows = turn.rows.copy()
            for pair in closing:
                values_ND = await self.dialogue.see(np.stack(pair.frames))
                second = max(0, pair.time_ms - turn.start // _PER_MS) // 1000
                rows.see(second, self.dialogue.template.pair(values_ND, pair.time_ms))
            wave_S = self.ear.log.cut(start, until)
            values_ND = await self.dialogue.hear(turn, number, wave_S, True, self.ear.log)
            item.blocks = [*turn.blocks, *rows.hear(values_ND, final=True), self.dialogue.template.closing("user")]

        return self.dialogue.do(work)

    def _item(self, turn: LiveTurn) -> Item:
        return Item(id=turn.item_id, content=[{"type": "input_audio", "transcript": None}])

    def _speculate(self, turn: LiveTurn, at: int) -> None:
        detection = self.settings.detection
        if self.answers.busy or detection is None or not detection["create_response"]:
            return
        self._feed(turn, at)
        item = self._item(turn)
        closing = self._close(turn, at, item)
        response = self.answers.begin(item)
        self.attempt = Attempt(until=at, item=item, response=response, closing=closing)

    def _rollback(self) -> None:
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        self.rollbacks += 1
        attempt.closing.cancel()
        self.answers.drop(attempt.response)
        frames, self._late_frames = self._late_frames, []
        for frame, ts_ms in frames:
            self.look(frame, ts_ms)

    def _turn_end(self, turn: LiveTurn, event: Event) -> None:
        now = time.monotonic()
        detection = self.settings.detection or {}
        self.emit(
            {
                "type": "input_audio_buffer.speech_stopped",
                "audio_end_ms": event.speech_end // _PER_MS,
                "item_id": turn.item_id,
            }
        )
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            self._commit_item(turn, attempt.item, attempt.until, attempt.closing)
            self.answers.release(attempt.response, now)
            return
        self._end(turn, event.at, answer=bool(detection.get("create_response")))

    def _end(self, turn: LiveTurn, until: int, *, answer: bool) -> None:
        """End a turn for which no answer is being made yet."""
        self._feed(turn, until)
        item = self._item(turn)
        closing = self._close(turn, until, item)
        self._commit_item(turn, item, self.ear.log.end, closing)
        if answer and not self.answers.busy:
            self.answers.release(self.answers.begin())
        elif self.ear.phase == Phase.SPEAK and self.answers.active is None:
            self.spoken()

    def _commit_item(self, turn: LiveTurn, item: Item, until: int, closing: asyncio.Task[None]) -> None:
        previous = self.dialogue.conversation.add(item)
        self.emit({"type": "input_audio_buffer.committed", "item_id": item.id, "previous_item_id": previous})
        for kind in ("conversation.item.added", "conversation.item.done"):
            self.emit({"type": kind, "previous_item_id": previous, "item": item.wire()})
        self.turn = None
        if item.blocks or item.failure is not None:
            self.ear.needed.pop(turn.number, None)
        self._committed = until
        self.camera, _ = end_turn(self.camera)
        frames, self._late_frames = self._late_frames, []
        for frame, ts_ms in frames:
            self.look(frame, ts_ms)
        self.on_commit(item, closing)

    def _interrupted(self) -> None:
        detection = self.settings.detection or {}
        if detection.get("interrupt_response", True):
            self.answers.cancel("turn_detected")
