"""The input side of a session: a turn whose answer is ready ends with the very piece that completes its silence."""

from __future__ import annotations

import numpy as np
import pytest
from live import pcm, room, voiced

from omni_ray.config.serving import TurnConfig
from omni_ray.inference.turn import Sign
from omni_ray.inference.vad import voice_activity
from pipelines.serving.realtime.hearing import Ear
from pipelines.serving.sound import Format

PIECE = 480
"""20 ms at 24 kHz."""


def ends_with(ear: Ear, wave: np.ndarray, answered: bool) -> tuple[int, int]:
    """(piece with which the turn ended, its t2 at 16 kHz)."""
    for piece in range(len(wave) // PIECE):
        for event in ear.push(pcm(wave[piece * PIECE : (piece + 1) * PIECE]), answered):
            if event.sign == Sign.TURN_END:
                return piece, event.speech_end
    raise AssertionError("the turn did not end")


@pytest.mark.parametrize("answered", [True, False])
def test_a_turn_ends_with_the_piece_that_completes_its_silence(answered: bool) -> None:
    wave = np.concatenate([room(0.5), voiced(1.0), room(1.5)])
    speech_end = ends_with(Ear(Format(), TurnConfig(), voice_activity("energy")), wave, answered)[1]
    # The silence limit is laid on the end of a piece, where the last samples are still inside the resampler.
    due = -(-(speech_end + 9600) * 3 // 2 // PIECE) * PIECE
    silence_ms = due * 2 / 3 / 16 - speech_end / 16
    assert silence_ms == int(silence_ms)
    ear = Ear(Format(), TurnConfig(silence_ms=int(silence_ms)), voice_activity("energy"))
    piece, _ = ends_with(ear, wave, answered)
    assert piece == due // PIECE - 1 + (not answered)


def test_a_change_of_format_in_the_middle_keeps_the_count() -> None:
    ear = Ear(Format(), TurnConfig(), voice_activity("energy"))
    ear.push(pcm(room(0.5)))
    ear.configure(Format("audio/pcm", 16000), TurnConfig())
    before = ear.log.end
    ear.push(pcm(room(0.1, 16000)), answered=True)
    assert ear.state.heard == ear.log.end == before + 1600
