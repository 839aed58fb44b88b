"""How fast the tiny codec codes and speaks on one core, what recognisers understand, and whether a long stream grows.

Speed stands beside the EnCodec network of ``transformers`` with random weights and a matched number of parameters (its
weights do not matter for time), in turns on the same recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.models.codec import Codec
from omni_ray.types.errors import DataError
from pipelines.bench.codec_judged import judged_figures
from pipelines.bench.codec_stream_memory import growth_elsewhere
from pipelines.bench.codec_tts import tts_figures
from pipelines.bench.writer import BenchReport, Figure, alternate, environment, measured, negative_control
from pipelines.codec_files import load_codec

ENCODE_S, DECODE_S = 10.0, 10.0
"""Length of the recording of a timing."""
FIRST_FRAMES = 4
"""One frame of sound needs itself and three frames of look-ahead."""
HOUR_S = 3600.0
LEAK_S = 600.0
"""Of the negative control."""
GROWTH = 1.02
REPEATS, QUICK_REPEATS = 15, 5


def run(*, quick: bool, seed: int, checkpoint: Path | None = None) -> BenchReport:
    """All figures of the codec; one thread. ``checkpoint``: whose language model speaks."""
    torch.set_num_threads(1)
    codec, fingerprint = load_codec(None)
    figures = speed_figures(codec, QUICK_REPEATS if quick else REPEATS, seed)
    figures += [*judged_figures(codec), *tts_figures(checkpoint), *memory_figures(seed)]
    facts = environment(seed=seed, quick=quick, codec=fingerprint, parameters=_count(codec), threads=1)
    return BenchReport(bench="codec", figures=tuple(figures), environment=facts)


def speed_figures(codec: Codec, repeats: int, seed: int) -> list[Figure]:
    """Compute seconds per second of sound, both codecs in turns, and the time to the first sound."""
    chance = torch.Generator().manual_seed(seed)
    wave_S = 0.1 * torch.randn(round(ENCODE_S * codec.config.sample_rate_hz), generator=chance)
    codes_NK = _random_codes(codec, round(DECODE_S * codec.frame_rate_hz), chance)
    ours = {
        "encode": lambda: _rtf(lambda: codec.encode(wave_S, codec.config.sample_rate_hz), ENCODE_S),
        "decode": lambda: _rtf(lambda: stream_all(codec, codes_NK), DECODE_S),
        "first": lambda: 1e3 * _rtf(lambda: codec.stream().push(codes_NK[:FIRST_FRAMES]), 1.0),
    }
    other = EncodecRival(_count(codec), seed)
    theirs = {
        "their encode": lambda: _rtf(other.encode, ENCODE_S),
        "their decode": lambda: _rtf(other.decode, ENCODE_S),
    }
    sides: dict[str, Callable[[], float]] = {**ours, **theirs}
    runs = alternate(sides, repeats, lambda: [side() for side in sides.values()])
    told = f"CPU seconds per second of sound, one core; EnCodec network of {other.parameters / 1e6:.2f} M beside it"
    parts = {
        name: tuple(theirs_s / ours_s for ours_s, theirs_s in zip(runs[name], runs[f"their {name}"], strict=True))
        for name in ("encode", "decode")
    }
    faster = "EnCodec network (whole clip, 24 kHz) over ours, CPU seconds"
    return [
        measured("encode_rtf", runs["encode"], unit="ratio", better="lower", goal=0.05, against=told),
        measured("decode_rtf", runs["decode"], unit="ratio", better="lower", goal=0.03, against=f"streaming; {told}"),
        measured(
            "first_audio_compute_ms",
            runs["first"],
            unit="ms",
            better="lower",
            goal=20,
            against="4 frames pushed; CPU time",
        ),
        measured("encode_speedup", parts["encode"], unit="ratio", better="higher", against=faster),
        measured("decode_speedup", parts["decode"], unit="ratio", better="higher", against=faster),
    ]


class EncodecRival:
    """EnCodec at random weights, narrowed to about so many parameters."""

    def __init__(self, parameters: int, seed: int) -> None:
        """
        Raises:
            DataError: transformers is not installed.
        """
        try:
            from transformers import EncodecConfig, EncodecModel
        except ImportError as error:
            raise DataError("transformers is not installed; EnCodec, the rival, comes from it") from error
        torch.manual_seed(seed)
        sizes = [self._sized(EncodecConfig, EncodecModel, filters) for filters in range(4, 33, 2)]
        self.model = min(sizes, key=lambda model: abs(_count(model) - parameters)).eval()
        self.parameters = _count(self.model)
        self.wave_1CS = 0.1 * torch.randn(1, 1, round(ENCODE_S * self.model.config.sampling_rate))
        with torch.inference_mode():
            self.codes = self.model.encode(self.wave_1CS, bandwidth=self.model.config.target_bandwidths[0])

    @staticmethod
    def _sized(config: Any, model: Any, filters: int) -> Any:
        width = 128 * filters // 32
        return model(config(num_filters=filters, hidden_size=width, codebook_dim=width))

    def encode(self) -> None:
        """Ten seconds to codes."""
        with torch.inference_mode():
            self.model.encode(self.wave_1CS, bandwidth=self.model.config.target_bandwidths[0])

    def decode(self) -> None:
        """The codes to ten seconds."""
        with torch.inference_mode():
            self.model.decode(self.codes.audio_codes, self.codes.audio_scales)


def memory_figures(seed: int) -> list[Figure]:
    """Memory after one streamed hour over after two minutes; a leak put in on purpose must be seen."""
    grown = growth_elsewhere(HOUR_S, seed, leak=False)
    leaking = growth_elsewhere(LEAK_S, seed, leak=True)
    return [
        measured("memory_growth_1h", [grown], unit="ratio", better="lower", goal=GROWTH, against="one streamed hour"),
        negative_control(int(leaking > GROWTH), f"a stream that keeps its sound, {LEAK_S:g} s: {leaking:.3f}"),
    ]


def stream_all(codec: Codec, codes_NK: Tensor) -> int:
    """Decode frame by frame, as a conversation does; returns the samples."""
    stream = codec.stream()
    return sum(len(stream.push(row_K.unsqueeze(0))) for row_K in codes_NK) + len(stream.flush())


def _random_codes(codec: Codec, frames: int, chance: torch.Generator) -> Tensor:
    return torch.stack([torch.randint(0, size, (frames,), generator=chance) for size in codec.code_sizes()], dim=1)


def _rtf(work: Callable[[], object], seconds: float) -> float:
    """Compute seconds (the process's own, one thread) per second of sound; neighbours on the machine do not count."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / seconds


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())
