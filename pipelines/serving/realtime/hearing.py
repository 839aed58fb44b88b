"""The input side of a session: sound as it comes, turns found in it, packets cut from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.serving import TurnConfig
from omni_ray.inference.turn import SAMPLE_RATE_HZ, Event, Heard, Order, Phase, Signal, TurnState, advance
from omni_ray.inference.vad import VadState, VoiceActivity
from pipelines.serving.errors import ApiError
from pipelines.serving.realtime.context import Block, Template, TurnRows
from pipelines.serving.realtime.items import new_id
from pipelines.serving.sound import Format, SoundReader

PACKET = SAMPLE_RATE_HZ
"""Samples of a packet: 1 s."""


class SoundLog:
    """Samples since the stream began, those that nobody needs any more forgotten."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.float32]] = []
        self.start = 0
        self.end = 0

    def push(self, wave_S: NDArray[np.float32]) -> None:
        """Append."""
        if len(wave_S):
            self._pieces.append(wave_S)
            self.end += len(wave_S)

    def cut(self, start: int, end: int) -> NDArray[np.float32]:
        """Samples [start, end), as far as they are kept."""
        whole = self._joined()
        return whole[max(0, start - self.start) : max(0, end - self.start)]

    def forget(self, before: int) -> None:
        """Samples before this one are needed no more."""
        drop = min(before, self.end) - self.start
        if drop >= PACKET:  # seldom, so that it costs little
            kept = self._joined()[drop:].copy()
            self._pieces, self.start = [kept], self.start + drop

    def _joined(self) -> NDArray[np.float32]:
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0] if self._pieces else np.zeros(0, np.float32)


class LiveTurn:
    """A turn that is being heard."""

    def __init__(self, number: int, start: int, template: Template) -> None:
        self.number, self.start = number, start
        self.item_id = new_id("item")
        self.fed = start
        """Samples before this one lie in packets."""
        self.packets = 0
        self.rows = TurnRows(template)
        self.blocks: list[Block] = [template.opening("user")]
        self.heard_packets = 0
        """Packets whose rows stand in ``blocks``."""
        self.failure: ApiError | None = None
        """A stage failed on one of its pictures."""


class Ear:
    """Bytes to turn events, with or without a detector."""

    def __init__(self, form: Format, config: TurnConfig | None, activity: VoiceActivity) -> None:
        """``config`` None: the client says when a turn ends."""
        self.log = SoundLog()
        self._activity = activity
        self.state, self._vad = TurnState(), VadState()
        self.config = config
        self._reader, self._reader_start = SoundReader(form), 0
        self.form = form
        self.needed: dict[int, int] = {}
        """First sample of every turn that is still being worked on, by its number."""

    def configure(self, form: Format, config: TurnConfig | None) -> None:
        """Follow a change of the session's settings."""
        if form != self.form:
            self._reader, self._reader_start, self.form = SoundReader(form), self.log.end, form
        if (config is None) != (self.config is None):
            # The detector hears a stream without gaps: it begins anew where it was off.
            self.state = TurnState(phase=self.state.phase if config is None else Phase.IDLE, heard=self.log.end)
            self._vad = VadState(start=self.log.end)
        self.config = config

    def push(self, raw: bytes, answered: bool = False) -> list[Event]:
        """Append sound; what it means.

        ``answered``: an answer to the turn stands ready. The turn then ends when its silence has arrived, and does not
        wait for the last samples to leave the resampler: nobody will look at them.
        """
        wave_S = self._reader.push(raw)
        self.log.push(wave_S)
        self._tidy()
        if self.config is None:
            return []
        windows, self._vad = self._activity.push(wave_S, self._vad)
        until = max(self.log.end, self._reader_start + self._reader.arrived) if answered else self.log.end
        signals: list[Signal] = [*windows, Heard(until=until)]
        return [event for signal in signals for event in self._step(signal)]

    def order(self, order: Order) -> list[Event]:
        """An order of the client, or the news that the answer was heard."""
        return self._step(order)

    @property
    def phase(self) -> Phase:
        """Where the conversation stands."""
        return self.state.phase

    def _tidy(self) -> None:
        """Keep what a turn that begins now would reach back to, and what unfinished turns need."""
        if self.state.phase in (Phase.IDLE, Phase.SPEAK):
            reach = (self.config.prefix_ms if self.config is not None else 0) + 2000
            self.log.forget(min(self.log.end - reach * SAMPLE_RATE_HZ // 1000, *self.needed.values(), self.log.end))

    def _step(self, signal: Signal) -> list[Event]:
        self.state, events = advance(self.state, signal, self.config or TurnConfig())
        return list(events)
