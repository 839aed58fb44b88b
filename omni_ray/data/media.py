"""Media spans decoded to what the workers take: uint8 frames at their final size, or float32 waves.

Normalising and patchifying happen where the pixels are used, so that bytes and not floats travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.config.model import OmniConfig, VisionConfig
from omni_ray.data.audio import decode_audio
from omni_ray.data.image import decode_image, fit_size, image_size, patchify, resize
from omni_ray.data.video import frames_at, video_frames
from omni_ray.types.modality import Modality
from omni_ray.types.sample import MediaSpan, Sample, SoundPart


def decode_spans(sample: Sample, spans: Sequence[MediaSpan], model: OmniConfig) -> tuple[Any, ...]:
    """Every span's media; each clip is decoded once.

    Raises:
        MediaError: as :func:`decode_span`.
    """
    memory: dict[str, Any] = {}
    for span in spans:
        if span.frames:
            memory.setdefault(f"wanted {span.name}", set()).update(span.frames)
    return tuple(decode_span(sample, span, model, memory) for span in spans)


def decode_span(sample: Sample, span: MediaSpan, model: OmniConfig, memory: dict[str, Any]) -> Any:
    """One span's media.

    Args:
        sample: Holds the bytes.  span: One of its encoded spans.  model: Sizes.
        memory: Kept between the spans of one sample, so that a clip is decoded once.
    Returns:
        Vision: uint8 frames [2, h, w, 3] (one frame for a picture, which the worker repeats along time).
        Audio and speech: float32 wave [S] at the encoder's or codec's rate; a stretch of a sound is a ``SoundPart``.

    Raises:
        MediaError: the bytes cannot be decoded; names the sample and the member.
    """
    raw, where = sample.media[span.name], f"{sample.key}/{span.name}"
    if span.modality == Modality.AUDIO:
        if span.of_rows == 0:
            return decode_audio(raw, where, model.audio.sample_rate_hz)
        sound = f"sound {span.name}"
        if sound not in memory:
            memory[sound] = decode_audio(raw, where, model.audio.sample_rate_hz)
        return SoundPart(wave=memory[sound], first=span.first_row, rows=span.length)
    if span.modality == Modality.SPEECH:
        return decode_audio(raw, where, model.codec.sample_rate_hz)
    if span.kind == "image":
        return resize(decode_image(raw, where), fit_size(*image_size(raw, where), model.vision))[None]
    if span.frames:
        return _window_pair(raw, where, span, model.vision, memory)
    if span.name not in memory:
        memory[span.name] = video_frames(raw, where, model.vision)
    step = model.vision.temporal_patch_size
    frames: NDArray[np.uint8] = memory[span.name][span.frame_pair * step : (span.frame_pair + 1) * step]
    return frames


def _window_pair(
    raw: bytes, where: str, span: MediaSpan, config: VisionConfig, memory: dict[str, Any]
) -> NDArray[np.uint8]:
    size = span.grid[1] * config.patch_size, span.grid[2] * config.patch_size
    kept: dict[int, NDArray[np.uint8]] = memory.setdefault(f"frames {span.name} {size}", {})
    if not set(span.frames) <= set(kept):
        kept |= frames_at(raw, where, [*memory.get(f"wanted {span.name}", ()), *span.frames], size)
    return np.stack([kept[number] for number in span.frames])


def sound_rows(network: Any, media: Sequence[NDArray[np.float32] | SoundPart]) -> tuple[Tensor, tuple[int, ...]]:
    """Rows of several sounds, one after another, as an audio encoder makes them; parts of one sound share one run.

    Args:
        network: Waves [S] in, rows [I, D] and rows per wave out.  media: Waves, or stretches of them.
    """
    waves: list[Tensor] = []
    known: dict[bytes, int] = {}
    places = []
    for item in media:
        if not isinstance(item, SoundPart):
            places.append(len(waves))
            waves.append(torch.from_numpy(np.array(item)))
            continue
        key = hashlib.blake2b(item.wave.tobytes(), digest_size=16).digest()
        if key not in known:
            known[key] = len(waves)
            waves.append(torch.from_numpy(np.array(item.wave)))
        places.append(known[key])
    rows_ID, lengths = network(waves)
    if not known:
        return rows_ID, tuple(int(length) for length in lengths)
    sounds = rows_ID.split([int(length) for length in lengths])
    cut = [
        sounds[place][item.first : item.first + item.rows] if isinstance(item, SoundPart) else sounds[place]
        for item, place in zip(media, places, strict=True)
    ]
    return torch.cat(cut), tuple(len(rows) for rows in cut)


def frame_pairs(frames_FHW3: NDArray[np.uint8], config: VisionConfig) -> NDArray[np.uint8]:
    """A picture's single frame stands twice along time; frame pairs stay as they are."""
    if frames_FHW3.shape[0] == config.temporal_patch_size:
        return frames_FHW3
    return np.repeat(frames_FHW3, config.temporal_patch_size, axis=0)


def patch_rows(media: Sequence[NDArray[np.uint8]], config: VisionConfig) -> tuple[NDArray[np.float32], list[Any]]:
    """Patch rows and grids of several spans, one after another, as the vision encoder takes them."""
    cut = [patchify(frame_pairs(frames, config), config) for frames in media]
    return np.concatenate([patches.values_PC for patches in cut]), [patches.grid for patches in cut]
