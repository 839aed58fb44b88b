"""What a replica keeps for its sessions between calls: the encoder's streams and the codec's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omni_ray.models.audio_encoder import AudioEncoder, AudioState
from omni_ray.models.codec import Codec
from omni_ray.models.codec_stream import CodecStream
from pipelines.serving.stages import SessionLostError

MOST_SESSIONS = 4096
"""Streams kept; the one that was longest without use is forgotten, and built again where it is asked for."""


class AudioRoom:
    """Running sounds: the state after the last whole packet of each session's turn."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder
        self._states: OrderedDict[str, tuple[int, int, AudioState]] = OrderedDict()

    @torch.no_grad()
    def hear(
        self, session: str, turn: int, packet: int, wave_S: NDArray[np.float32], final: bool
    ) -> NDArray[np.float32]:
        """Rows [n, D] that this packet makes certain; ``final`` adds those after which no sound comes, and is not kept.

        Raises:
            SessionLostError: the packet before this one was not heard here.
        """
        if packet == 0:
            state = self.encoder.initial_state()
        else:
            have_turn, have_packet, state = self._states.get(session, (-1, -1, None))  # type: ignore[assignment]
            if (have_turn, have_packet) != (turn, packet):
                raise SessionLostError(f"packet {packet} of turn {turn} follows nothing that this replica heard")
        rows_BND, after = self.encoder(torch.from_numpy(np.array(wave_S, np.float32))[None], state)
        if final:
            return torch.cat([rows_BND, self.encoder.flush(after)], dim=1)[0].numpy()
        self._states[session] = turn, packet + 1, after
        self._states.move_to_end(session)
        while len(self._states) > MOST_SESSIONS:
            self._states.popitem(last=False)
        rows: NDArray[np.float32] = rows_BND[0].numpy()
        return rows

    def forget(self, session: str) -> None:
        """Free a session's stream."""
        self._states.pop(session, None)

    def __len__(self) -> int:
        return len(self._states)


class SpeechRoom:
    """Running answers: one decoder stream a session."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._streams: OrderedDict[str, tuple[int, int, CodecStream]] = OrderedDict()

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
            have_answer, have_first, found = self._streams.get(session, (-1, -1, None))
            if found is None or (have_answer, have_first) != (answer, first):
                raise SessionLostError(f"frame {first} of answer {answer} follows nothing that this replica decoded")
            stream = found
        pieces: list[Any] = [stream.push(torch.from_numpy(np.array(codes_N4)))] if len(codes_N4) else []
        if final:
            pieces.append(stream.flush())
            self._streams.pop(session, None)
        else:
            self._streams[session] = answer, first + len(codes_N4), stream
            self._streams.move_to_end(session)
            while len(self._streams) > MOST_SESSIONS:
                self._streams.popitem(last=False)
        wave: NDArray[np.float32] = torch.cat(pieces).numpy() if pieces else np.zeros(0, np.float32)
        return wave

    def forget(self, session: str) -> None:
        """Free a session's stream."""
        self._streams.pop(session, None)

    def __len__(self) -> int:
        return len(self._streams)
