"""Voice activity: chunked equals whole; speech is found where it lies, by both detectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omni_ray.config.serving import TurnConfig
from omni_ray.inference.turn import SAMPLE_RATE_HZ, Heard, Sign, TurnState, advance
from omni_ray.inference.vad import WINDOW, VadState, VoiceActivity, voice_activity


@pytest.fixture(params=["silero", "energy"])
def activity(request: pytest.FixtureRequest) -> VoiceActivity:
    if request.param == "silero":
        pytest.importorskip("silero_vad", reason="silero-vad is not installed")
    return voice_activity(request.param)


def voiced(seconds: float, seed: int = 0) -> np.ndarray:
    """A vowel-like sound: harmonics of 120 Hz under two formants, with vibrato."""
    time_s = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    pitch = 2 * np.pi * np.cumsum(120 + 6 * np.sin(2 * np.pi * 5 * time_s)) / SAMPLE_RATE_HZ
    wave = np.zeros_like(time_s)
    for harmonic in range(1, 30):
        hz = 120 * harmonic
        gain = np.exp(-(((hz - 700) / 200) ** 2)) + 0.6 * np.exp(-(((hz - 1200) / 250) ** 2)) + 0.05 / harmonic
        wave += gain * np.sin(harmonic * pitch)
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s)
    return (0.15 * wave * envelope).astype(np.float32)


def with_silence(before_s: float, speech_s: float, after_s: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 2e-4, int((before_s + speech_s + after_s) * SAMPLE_RATE_HZ))
    wave = noise.astype(np.float32)
    start = int(before_s * SAMPLE_RATE_HZ)
    wave[start : start + int(speech_s * SAMPLE_RATE_HZ)] += voiced(speech_s)
    return wave


@pytest.mark.parametrize("sizes", [[320], [1, 511, 512, 513, 3000], [100_000]], ids=str)
def test_chunked_equals_whole(activity: VoiceActivity, sizes: list[int]) -> None:
    wave = with_silence(0.5, 1.0, 0.7)
    whole, _ = activity.push(wave, VadState())
    state, parts, start, turn = VadState(), [], 0, 0
    while start < len(wave):
        size = sizes[turn % len(sizes)]
        found, state = activity.push(wave[start : start + size], state)
        parts += found
        start, turn = start + size, turn + 1
    assert parts == whole
    assert len(whole) == len(wave) // WINDOW
    assert [window.start for window in whole] == list(range(0, len(whole) * WINDOW, WINDOW))


def test_a_state_is_a_snapshot(activity: VoiceActivity) -> None:
    wave = with_silence(0.2, 0.8, 0.2)
    _, middle = activity.push(wave[:9000], VadState())
    assert activity.push(wave[9000:], middle)[0] == activity.push(wave[9000:], middle)[0]


def test_a_turn_is_found_where_it_lies(activity: VoiceActivity) -> None:
    wave = with_silence(1.0, 2.0, 1.5)
    config = TurnConfig()
    state, vad, events = TurnState(), VadState(), []
    for start in range(0, len(wave), 320):
        windows, vad = activity.push(wave[start : start + 320], vad)
        for signal in [*windows, Heard(until=start + 320)]:
            state, found = advance(state, signal, config)
            events += found
    assert [event.sign for event in events] == [Sign.TURN_START, Sign.SPECULATE, Sign.TURN_END]
    begun = events[0].at / SAMPLE_RATE_HZ + config.prefix_ms / 1000
    ended = events[2].speech_end / SAMPLE_RATE_HZ
    assert abs(begun - 1.0) <= 0.15
    assert abs(ended - 3.0) <= 0.012


def test_the_end_of_speech_is_the_sound_s_own_and_never_two_windows_before_the_detector_s(
    activity: VoiceActivity,
) -> None:
    def ends(wave: np.ndarray, measured: bool) -> int:
        state = TurnState()
        for window in activity.push(wave, VadState())[0]:
            state, _ = advance(state, window if measured else replace(window, loud_end=None), TurnConfig())
        return state.speech_end

    quiet = with_silence(1.0, 2.0, 0.3)
    assert ends(quiet, measured=True) <= ends(quiet, measured=False)
    # In noise as loud as the voice nothing rises out of it; the detector is then believed but for its trail.
    loud = quiet + np.random.default_rng(3).normal(0, 0.05, len(quiet)).astype(np.float32)
    assert ends(loud, measured=True) >= ends(loud, measured=False) - 2 * WINDOW


def test_digital_silence_is_never_speech(activity: VoiceActivity) -> None:
    windows, _ = activity.push(np.zeros(16000, np.float32), VadState())
    assert {window.probability for window in windows} == {0.0}
