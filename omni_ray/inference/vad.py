"""Voice activity: 16 kHz sound to the probability of speech in every window of 32 ms, streaming."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from omni_ray.inference.turn import SAMPLE_RATE_HZ, Window
from omni_ray.observability.events import emit

# S samples, W samples of a window, C samples of context before it

WINDOW = 512
"""Samples of a window: 32 ms."""
_CONTEXT = 64
"""Samples before a window that silero looks at again."""
FLOOR_DBFS = -62.0
"""A window quieter than this is silence whatever a detector says: detectors trail behind the end of a word."""
SLICE = 64
"""Samples of the slices in which the end of a sound is looked for: 4 ms."""
ABOVE_NOISE_DB, BELOW_SPEECH_DB = 6.0, 30.0
"""A slice that rises above the noise by less, or lies below the loudest speech by more, is no sound of a voice."""
_SPEECH_FALL_DB = 0.1
"""A window: the loudest speech is forgotten at 3 dB a second."""
_NOISE_START_DBFS = -50.0
_ABOVE_NOISE_DB = 12.0
_SLOPE_DB = 3.0


@dataclass(frozen=True, slots=True)
class VadState:
    """A running stream; never changed in place."""

    tail_S: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """Samples of the window that is not complete yet."""
    start: int = 0
    """Place of the tail's first sample in the stream."""
    memory: Any = None
    """What the detector keeps; None before the first window."""
    noise_dbfs: float = _NOISE_START_DBFS
    """Level of the noise so far."""
    speech_dbfs: float = -120.0
    """Level of the loudest speech, lately."""


class Detector(Protocol):
    """Judges one window after another."""

    name: str

    def judge(self, window_W: NDArray[np.float32], memory: Any) -> tuple[float, Any]:
        """Probability of speech, and what to remember."""
        ...


class VoiceActivity:
    """One detector over any number of streams."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def push(self, chunk_S: NDArray[np.float32], state: VadState) -> tuple[list[Window], VadState]:
        """Judge the windows that a chunk completes; the same for any chunking.

        Args:
            chunk_S: New samples, any number.  state: From the last call; ``VadState()`` begins a stream.
        """
        samples_S = np.concatenate([state.tail_S, chunk_S.astype(np.float32, copy=False)])
        memory, start, windows = state.memory, state.start, []
        noise, speech = state.noise_dbfs, state.speech_dbfs
        complete = len(samples_S) // WINDOW
        for window_W in samples_S[: complete * WINDOW].reshape(complete, WINDOW):
            probability, memory = self.detector.judge(window_W, memory)
            level = level_dbfs(window_W)
            if level < FLOOR_DBFS:
                probability = 0.0
            speech = max(speech - _SPEECH_FALL_DB, level if probability >= 0.5 else -120.0)
            loud = _loud_samples(window_W, max(FLOOR_DBFS, noise + ABOVE_NOISE_DB, speech - BELOW_SPEECH_DB))
            windows.append(Window(probability=probability, start=start, end=start + WINDOW, loud_end=start + loud))
            noise = follow_noise(noise, level, probability)
            start += WINDOW
        return windows, VadState(samples_S[complete * WINDOW :].copy(), start, memory, noise, speech)


class SileroDetector:
    """silero-vad, from its package; one session serves all streams."""

    name = "silero"

    def __init__(self) -> None:
        """Raises ImportError where silero-vad or onnxruntime is not installed."""
        from silero_vad import load_silero_vad

        self._session: Any = load_silero_vad(onnx=True).session

    def judge(self, window_W: NDArray[np.float32], memory: Any) -> tuple[float, Any]:
        """See :class:`Detector`; the memory is the network's state and the last samples."""
        if memory is None:
            memory = np.zeros((2, 1, 128), np.float32), np.zeros(_CONTEXT, np.float32)
        network, context_C = memory
        given = np.concatenate([context_C, window_W])[None]
        rate = np.array(SAMPLE_RATE_HZ, np.int64)
        out, network = self._session.run(None, {"input": given, "state": network, "sr": rate})
        return float(out[0, 0]), (network, window_W[-_CONTEXT:].copy())


class EnergyDetector:
    """Speech is what rises above the noise, whose level follows slowly; needs nothing but numpy."""

    name = "energy"

    def judge(self, window_W: NDArray[np.float32], memory: Any) -> tuple[float, Any]:
        """See :class:`Detector`; the memory is the level of the noise in dBFS."""
        noise = _NOISE_START_DBFS if memory is None else float(memory)
        level = level_dbfs(window_W)
        probability = 1.0 / (1.0 + float(np.exp(-(level - noise - _ABOVE_NOISE_DB) / _SLOPE_DB)))
        return probability, follow_noise(noise, level, probability)


def follow_noise(noise_dbfs: float, level_dbfs: float, probability: float) -> float:
    """The noise after one more window: down at once, up by 1.5 dB a second while nobody speaks and slower in speech."""
    rise = 0.05 if probability < 0.5 else 0.01
    return max(-80.0, min(level_dbfs, noise_dbfs + rise))


def _loud_samples(window_W: NDArray[np.float32], least_dbfs: float) -> int:
    """Samples up to the end of the last slice that reaches this level; 0 where none does."""
    power_N = np.square(window_W.reshape(-1, SLICE), dtype=np.float64).mean(axis=1)
    loud = np.flatnonzero(power_N >= 10 ** (least_dbfs / 10))
    return int(loud[-1] + 1) * SLICE if len(loud) else 0


def level_dbfs(window_W: NDArray[np.float32]) -> float:
    """Root mean square in dB under full scale."""
    return float(10.0 * np.log10(np.mean(np.square(window_W, dtype=np.float64)) + 1e-12))


@functools.lru_cache(maxsize=2)
def voice_activity(name: str) -> VoiceActivity:
    """The detector of a configuration (``silero`` or ``energy``), one a process."""
    if name == "silero":
        try:
            return VoiceActivity(SileroDetector())
        except ImportError:
            emit("vad_fallback", wanted="silero", used="energy", mend="pip install silero-vad onnxruntime")
    return VoiceActivity(EnergyDetector())
