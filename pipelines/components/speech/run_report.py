"""What a stage leaves to hear and see: reconstructions of held-out recordings, their spectrograms, a page, the losses.

Legend: S samples, T frames of 10 ms, M mel bins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.models.codec import Codec
from omni_ray.models.fbank import mel_filters
from omni_ray.observability.metrics import METRICS_FILE
from pipelines.components.codec_figures import rebuilt, spectral_distance
from pipelines.components.codec_material import Clip

WINDOW, HOP, MELS = 1024, 240, 80
RANGE_DB = 70.0
"""From the loudest point down to black."""
ZOOM = 3
COLOURS = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=np.float64)
"""Dark to bright; colours between are mixed."""
AVERAGED = 20
"""Steps at the beginning and the end of a phase whose losses are told."""


def spectrogram(wave_S: Tensor, rate_hz: int) -> NDArray[np.uint8]:
    """Log-mel picture [M * zoom, T * zoom, 3], low pitches below."""
    spectrum = torch.stft(wave_S, WINDOW, HOP, window=torch.hann_window(WINDOW), center=True, return_complex=True)
    filters_FM = torch.from_numpy(mel_filters(MELS, 0.0, rate_hz / 2, rate_hz, WINDOW)).float()
    power_MT = filters_FM.t() @ spectrum.abs().square()
    level_MT = 10.0 * torch.log10(power_MT.clamp_min(1e-12))
    share_MT = ((level_MT - level_MT.max()) / RANGE_DB + 1.0).clamp(0.0, 1.0).flip(0).numpy().astype(np.float64)
    place = share_MT * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)
    mixed = COLOURS[low] + (place - low)[..., None] * (COLOURS[low + 1] - COLOURS[low])
    picture: NDArray[np.uint8] = mixed.round().astype(np.uint8).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    return picture


def write_samples(codec: Codec, clips: Sequence[Clip], folder: Path) -> list[dict[str, Any]]:
    """``NN-original.wav``, ``NN-rebuilt.wav`` and ``NN.png`` (original above, rebuilt below) of every clip.

    Returns:
        For each: name, words, the three files, and its spectral distance.
    """
    import soundfile
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rate_hz, told = codec.config.output_rate_hz, []
    for number, clip in enumerate(clips):
        made_S = rebuilt(codec, clip, codec.codebooks)[: len(clip.output_S)]
        files = {"original": f"{number:02d}-original.wav", "rebuilt": f"{number:02d}-rebuilt.wav"}
        for side, wave_S in (("original", clip.output_S), ("rebuilt", made_S)):
            soundfile.write(folder / files[side], wave_S.clamp(-1.0, 1.0).numpy(), rate_hz, subtype="PCM_16")
        rows = [spectrogram(wave_S, rate_hz) for wave_S in (clip.output_S[: len(made_S)], made_S)]
        line = np.full((4, rows[0].shape[1], 3), 255, dtype=np.uint8)
        Image.fromarray(np.concatenate([rows[0], line, rows[1]])).save(folder / f"{number:02d}.png")
        facts: dict[str, Any] = {"clip": clip.id, "words": " ".join(clip.words), **files}
        facts |= {"picture": f"{number:02d}.png", "spectral_distance": round(spectral_distance([clip], [made_S]), 4)}
        told.append(facts)
    return told


def phase_losses(folder: Path) -> list[dict[str, Any]]:
    """Mean losses of the first and the last steps of every phase, from ``metrics.jsonl``."""
    path = folder / METRICS_FILE
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    told = []
    for phase in dict.fromkeys(line["phase"] for line in lines):
        rows = [line for line in lines if line["phase"] == phase]
        first, last = _means(rows[:AVERAGED]), _means(rows[-AVERAGED:])
        told.append({"phase": phase, "steps": len(rows), "first": first, "last": last})
    return told


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [name for name in rows[-1] if name not in ("step", "time_s", "phase", "stage")]
    return {name: round(float(np.mean([row[name] for row in rows if name in row])), 5) for name in names}


def write_report(folder: Path, document: Mapping[str, Any]) -> None:
    """``report.json`` and ``index.html`` beside the samples."""
    (folder / "report.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    losses = "".join(
        f"<tr><td>{escape(row['phase'])}<td>{row['steps']}<td>{escape(_told(row['first']))}<td>"
        f"{escape(_told(row['last']))}</tr>"
        for row in document["losses"]
    )
    samples = "".join(
        f"<h3>{escape(s['words'] or s['clip'])} (distance {s['spectral_distance']})</h3>"
        f"<audio controls src='samples/{s['original']}'></audio> <audio controls src='samples/{s['rebuilt']}'></audio>"
        f"<br><img alt='spectrograms: original above, rebuilt below' src='samples/{s['picture']}'>"
        for s in document["samples"]
    )
    page = (
        f"<!doctype html><meta charset=utf-8><title>codec, stage {escape(document['stage'])}</title>"
        "<style>body{font:15px sans-serif;margin:2em}td{padding:.2em 1em .2em 0;vertical-align:top}</style>"
        f"<h1>Codec, stage {escape(document['stage'])}</h1><table><tr><th>phase<th>steps<th>first steps<th>last steps"
        f"</tr>{losses}</table>{samples}\n"
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def _told(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
