"""Video bytes to frame pairs: which frames are looked at, when they were shown, and their patch rows."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import VisionConfig
from omni_ray.data.image import MAX_PIXELS, Patches, fit_size, patchify, resize
from omni_ray.types.errors import MediaError

DEFAULT_FPS, MOST_FPS, LEAST_FRAMES = 2.0, 4.0, 16
"""Sampling: 2 frames a second, up to 4 where that gives fewer than 16 (source: models.md section 1)."""
MAX_SOURCE_FRAMES = 20_000
"""Longer films are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPlan:
    """What is known of a clip before its frames are decoded."""

    frames: tuple[int, ...]
    """Frame numbers to look at, ascending; an odd count repeats the last."""
    times_s: tuple[float, ...]
    """When each frame pair starts: the time of its first frame."""
    grid: tuple[int, int, int]
    """(frame pairs, patch rows, patch columns)."""


def plan_video(raw: bytes, name: str, config: VisionConfig) -> VideoPlan:
    """Count the frames and choose those to look at.

    Raises:
        MediaError: no video, no frames, or too many of them or of pixels; names the item.
    """
    stamps_s, height, width = _read_header(raw, name)
    chosen = choose_frames(len(stamps_s), _rate(stamps_s), config.max_frames)
    step = config.temporal_patch_size
    pairs = math.ceil(len(chosen) / step)
    budget = max(config.min_patches, config.max_patches // pairs)
    height, width = fit_size(height, width, config, max_patches=max(budget, _floor_patches(config)))
    start = stamps_s[0]
    return VideoPlan(
        frames=chosen,
        times_s=tuple(stamps_s[chosen[i * step]] - start for i in range(pairs)),
        grid=(pairs, height // config.patch_size, width // config.patch_size),
    )


def video_patches(raw: bytes, name: str, config: VisionConfig) -> Patches:
    """Decode the planned frames and cut them into patch rows, pair after pair.

    Raises:
        MediaError: as :func:`video_frames`.
    """
    return patchify(video_frames(raw, name, config), config)


def video_frames(raw: bytes, name: str, config: VisionConfig) -> NDArray[np.uint8]:
    """Decode the planned frames at their final size, [F, h, w, 3]; an odd count repeats the last.

    Raises:
        MediaError: as :func:`plan_video`, or frames that cannot be decoded.
    """
    plan = plan_video(raw, name, config)
    size = plan.grid[1] * config.patch_size, plan.grid[2] * config.patch_size
    wanted = set(plan.frames)
    kept = [resize(frame, size) for i, frame in enumerate(decode_frames(raw, name)) if i in wanted]
    if len(kept) != len(plan.frames):
        raise MediaError(f"{name} promises frame {max(wanted)} and cannot be decoded that far; export it again")
    missing = -len(kept) % config.temporal_patch_size
    return np.stack(kept + [kept[-1]] * missing)


def video_extent(raw: bytes, name: str) -> tuple[int, int, int]:
    """(frames, height, width) of a clip, from its packets' headers; nothing is decoded.

    Raises:
        MediaError: as :func:`plan_video`.
    """
    stamps_s, height, width = _read_header(raw, name)
    return len(stamps_s), height, width


def choose_frames(count: int, fps: float, most: int) -> tuple[int, ...]:
    """Frame numbers at the middles of equal segments of the clip.

    The clip is cut into duration * 2 FPS segments; where that gives fewer than 16, the rate rises up to 4 FPS; never
    more than ``most`` and never more than there are. A clip of at most 16 frames is looked at whole.

    Source: models.md section 1, video.
    """
    if count <= min(LEAST_FRAMES, most):
        return tuple(range(count))
    duration_s = count / fps
    wanted = max(duration_s * DEFAULT_FPS, min(LEAST_FRAMES, duration_s * MOST_FPS))
    total = max(1, min(count, most, round(wanted)))
    return tuple(math.floor((i + 0.5) * count / total) for i in range(total))


def decode_frames(raw: bytes, name: str) -> Iterator[NDArray[np.uint8]]:
    """Every frame of the first video track, [H, W, 3] uint8, in the order they are shown."""
    import av

    try:
        with av.open(io.BytesIO(raw), "r") as container:
            for frame in container.decode(_track(container, name)):
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MediaError(f"{name} cannot be decoded as video ({error}); send mp4 with h264") from error


def encode_mp4(
    frames_FHW3: NDArray[np.uint8], fps: int, sound: NDArray[np.float32] | None = None, sample_rate_hz: int = 16000
) -> bytes:
    """H.264 in mp4, one thread; with ``sound`` an AAC track besides.

    Args:
        frames_FHW3: uint8, even sides.  sound: [S] mono.
    """
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        options = {"crf": "14", "preset": "ultrafast", "threads": "1"}
        video: Any = container.add_stream("libx264", rate=fps, options=options)
        video.height, video.width = frames_FHW3.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio: Any = (
            None
            if sound is None
            else container.add_stream("aac", rate=sample_rate_hz, layout="mono", options={"aac_coder": "fast"})
        )
        for pixels in frames_FHW3:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            piece = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
            piece.sample_rate = sample_rate_hz
            container.mux(audio.encode(piece))
            container.mux(audio.encode())
    return out.getvalue()


def _read_header(raw: bytes, name: str) -> tuple[list[float], int, int]:
    """Show times of all frames in seconds, height, width; packets are read, not decoded."""
    import av

    try:
        with av.open(io.BytesIO(raw), "r") as container:
            track = _track(container, name)
            height, width = int(track.codec_context.height), int(track.codec_context.width)
            base = float(track.time_base or 0)
            stamps = []
            for packet in container.demux(track):
                if packet.pts is not None and packet.size:
                    stamps.append(packet.pts * base)
                if len(stamps) > MAX_SOURCE_FRAMES:
                    raise MediaError(f"{name} has more than {MAX_SOURCE_FRAMES} frames; cut it into pieces")
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MediaError(f"{name} cannot be read as video ({error}); send mp4 with h264") from error
    if not stamps or height < 1 or width < 1:
        raise MediaError(f"{name} has a video track without frames; export it again")
    if height * width > MAX_PIXELS:
        raise MediaError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}; scale it down")
    return sorted(stamps), height, width


def _track(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise MediaError(f"{name} has no video track; send mp4 with h264")
    return container.streams.video[0]


def _rate(stamps_s: list[float]) -> float:
    """Frames a second; a still is taken as one second."""
    span = stamps_s[-1] - stamps_s[0]
    return (len(stamps_s) - 1) / span if len(stamps_s) > 1 and span > 0 else 1.0


def _floor_patches(config: VisionConfig) -> int:
    """Patches of the smallest picture there is: one square of side_multiple."""
    return (config.side_multiple // config.patch_size) ** 2
