"""What a replica keeps for its sessions between calls: the encoder's streams and the codec's."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from omni_ray.models.audio_encoder import AudioEncoder, AudioState
from omni_ray.models.audio_streams import join, shape_of, split
from omni_ray.models.codec import Codec
from omni_ray.models.codec_stream import CodecStream
from omni_ray.types.errors import OmniError
from pipelines.serving.stages import SessionLostError

MOST_SESSIONS = 4096
"""Streams kept; the one that was longest without use is forgotten, and built again where it is asked for."""

T = TypeVar("T")


class Kept(Generic[T]):
    """A value a session, in the order of use; its threads are the one that works and the one that sweeps."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[float, T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, session: str) -> T | None:
        """What a session has."""
        found = self._held.get(session)
        return None if found is None else found[1]

    def put(self, session: str, value: T) -> None:
        """Keep; the one that was longest without use makes room."""
        with self._lock:
            self._held[session] = time.monotonic(), value
            self._held.move_to_end(session)
            while len(self._held) > MOST_SESSIONS:
                self._held.popitem(last=False)

    def pop(self, session: str) -> None:
        """Forget."""
        with self._lock:
            self._held.pop(session, None)

    def sweep(self, unused_s: float) -> None:
        """Forget what nobody has put for so long."""
        before = time.monotonic() - unused_s
        with self._lock:
            for session in [name for name, (used, _) in self._held.items() if used < before]:
                del self._held[session]

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True, slots=True)
class Packet:
    """A piece of a running sound."""

    session: str
    turn: int
    number: int
    """In its turn, from 0."""
    wave_S: NDArray[np.float32]
    """At the encoder's rate."""
    final: bool
    """The sound ends here, for this answer."""


class AudioRoom:
    """Running sounds: the state after the last whole packet of each session's turn."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder
        self._states: Kept[tuple[int, int, AudioState]] = Kept()

    def hear(
        self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool
    ) -> NDArray[np.float32]:
        """Rows [n, D] that this packet makes certain; ``final`` adds those after which no sound comes, and is not kept.

        Raises:
            SessionLostError: the packet before this one was not heard here.
        """
        (result,) = self.hear_together([Packet(session, turn, packet, wave_S, final)])
        if isinstance(result, Exception):
            raise result
        return result

    @torch.no_grad()
    def hear_together(self, packets: Sequence[Packet]) -> list[NDArray[np.float32] | Exception]:
        """As :meth:`hear` for each, in their order; those of one shape go through the encoder in one forward.

        Returns:
            Rows, or what there is to raise.
        """
        out: dict[int, NDArray[np.float32] | Exception] = {}
        groups: dict[Any, list[tuple[int, AudioState]]] = {}
        seen: set[str] = set()
        for place, packet in enumerate(packets):
            state = self._state_before(packet)
            if isinstance(state, Exception):
                out[place] = state
                continue
            # Two packets of one session cannot share a forward: the second goes on from the first.
            alone = place if packet.session in seen else None
            seen.add(packet.session)
            key = packet.final, len(packet.wave_S), shape_of(state), alone
            groups.setdefault(key, []).append((place, state))
        for group in groups.values():
            places = [place for place, _ in group]
            try:
                made = self._forward([packets[place] for place in places], [state for _, state in group])
            except OmniError as error:
                made = [error] * len(places) if len(places) == 1 else self._one_by_one(packets, places)
            out.update(zip(places, made, strict=True))
        return [out[place] for place in range(len(packets))]

    def _one_by_one(self, packets: Sequence[Packet], places: Sequence[int]) -> list[NDArray[np.float32] | Exception]:
        """A packet that cannot be encoded fails by itself, not those beside it."""
        return [self.hear_together([packets[place]])[0] for place in places]

    def _state_before(self, packet: Packet) -> AudioState | Exception:
        if packet.number == 0:
            return self.encoder.initial_state()
        kept = self._states.get(packet.session)
        if kept is None or kept[:2] != (packet.turn, packet.number):
            words = f"packet {packet.number} of turn {packet.turn} follows nothing that this replica heard"
            return SessionLostError(words)
        return kept[2]

    def _forward(
        self, packets: Sequence[Packet], states: Sequence[AudioState]
    ) -> list[NDArray[np.float32] | Exception]:
        wave_BS = torch.from_numpy(np.stack([np.array(packet.wave_S, np.float32) for packet in packets]))
        rows_BND, after = self.encoder(wave_BS, join(states))
        if packets[0].final:
            rows_BND = torch.cat([rows_BND, self.encoder.flush(after)], dim=1)
        else:
            for packet, state in zip(packets, split(after), strict=True):
                self._states.put(packet.session, (packet.turn, packet.number + 1, state))
        return [rows_ND.float().cpu().numpy().copy() for rows_ND in rows_BND]

    def forget(self, session: str) -> None:
        """Free a session's stream."""
        self._states.pop(session)

    def sweep(self, unused_s: float) -> None:
        """Forget streams that went on no more for so long."""
        self._states.sweep(unused_s)

    def __len__(self) -> int:
        return len(self._states)


class SpeechRoom:
    """Running answers: one decoder stream a session."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._streams: Kept[tuple[int, int, CodecStream]] = Kept()

    def say(
        self, session: str, answer: int, first: int, codes_N4: NDArray[np.int64], final: bool
    ) -> NDArray[np.float32]:
        """Sound [S] at 24 kHz of frames from number ``first`` on; ``final`` ends the answer.

        Raises:
            SessionLostError: the frames before ``first`` were not decoded here.
        """
        if first == 0:
            stream = self.codec.stream()
        else:
            kept = self._streams.get(session)
            if kept is None or kept[:2] != (answer, first):
                raise SessionLostError(f"frame {first} of answer {answer} follows nothing that this replica decoded")
            stream = kept[2]
        pieces: list[Any] = [stream.push(torch.from_numpy(np.array(codes_N4)))] if len(codes_N4) else []
        if final:
            pieces.append(stream.flush())
            self._streams.pop(session)
        else:
            self._streams.put(session, (answer, first + len(codes_N4), stream))
        wave: NDArray[np.float32] = torch.cat(pieces).numpy() if pieces else np.zeros(0, np.float32)
        return wave

    def forget(self, session: str) -> None:
        """Free a session's stream."""
        self._streams.pop(session)

    def sweep(self, unused_s: float) -> None:
        """Forget streams that went on no more for so long."""
        self._streams.sweep(unused_s)

    def __len__(self) -> int:
        return len(self._streams)
