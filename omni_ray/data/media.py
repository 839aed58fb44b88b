"""Media spans decoded to what the workers take: uint8 frames at their final size, or float32 waves.

Normalising and patchifying happen where the pixels are used, so that bytes and not floats travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import OmniConfig, VisionConfig
from omni_ray.data.audio import decode_audio
from omni_ray.data.image import decode_image, fit_size, image_size, patchify, resize
from omni_ray.data.video import video_frames
from omni_ray.types.modality import Modality
from omni_ray.types.sample import MediaSpan, Sample


def decode_span(sample: Sample, span: MediaSpan, model: OmniConfig, memory: dict[str, Any]) -> NDArray[Any]:
    """One span's media.

    Args:
        sample: Holds the bytes.  span: One of its encoded spans.  model: Sizes.
        memory: Kept between the spans of one sample, so that a clip is decoded once.
    Returns:
        Vision: uint8 frames [2, h, w, 3] (one frame for a picture, which the worker repeats along time).
        Audio and speech: float32 wave [S] at the encoder's or codec's rate.

    Raises:
        MediaError: the bytes cannot be decoded; names the sample and the member.
    """
    raw, where = sample.media[span.name], f"{sample.key}/{span.name}"
    if span.modality == Modality.AUDIO:
        return decode_audio(raw, where, model.audio.sample_rate_hz)
    if span.modality == Modality.SPEECH:
        return decode_audio(raw, where, model.codec.sample_rate_hz)
    if span.kind == "image":
        return resize(decode_image(raw, where), fit_size(*image_size(raw, where), model.vision))[None]
    if span.name not in memory:
        memory[span.name] = video_frames(raw, where, model.vision)
    step = model.vision.temporal_patch_size
    frames: NDArray[np.uint8] = memory[span.name][span.frame_pair * step : (span.frame_pair + 1) * step]
    return frames


def frame_pairs(frames_FHW3: NDArray[np.uint8], config: VisionConfig) -> NDArray[np.uint8]:
    """A picture's single frame stands twice along time; frame pairs stay as they are."""
    if frames_FHW3.shape[0] == config.temporal_patch_size:
        return frames_FHW3
    return np.repeat(frames_FHW3, config.temporal_patch_size, axis=0)


def patch_rows(media: Sequence[NDArray[np.uint8]], config: VisionConfig) -> tuple[NDArray[np.float32], list[Any]]:
    """Patch rows and grids of several spans, one after another, as the vision encoder takes them."""
    cut = [patchify(frame_pairs(frames, config), config) for frames in media]
    return np.concatenate([patches.values_PC for patches in cut]), [patches.grid for patches in cut]
