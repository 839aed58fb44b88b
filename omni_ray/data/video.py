"""Video bytes to frame pairs: which frames are looked at, when they were shown, and their patch rows."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import VisionConfig
from omni_ray.data.image import MAX_PIXELS, Patches, fit_size, patchify, resize
from omni_ray.data.last_read import LastRead
from omni_ray.data.reasons import reason
from omni_ray.types.errors import MediaError

DEFAULT_FPS, MOST_FPS, LEAST_FRAMES = 2.0, 4.0, 16
"""Sampling: 2 frames a second, up to 4 where that gives fewer than 16 (source: networks.md section 1)."""
MAX_SOURCE_FRAMES, MAX_VIDEO_S = 250_000, 3600.0
"""Longer films are refused, from their header where it tells."""
_SEEK_FRAMES = 256
"""Clips of more frames are decoded around the wanted frames only."""
_OPEN_BYTES = 4 * 2**20
"""Films of so many bytes stay open between the count of their frames and their decoding."""


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
    track = _read_track(raw, name)
    return _plan(track, config)


def _plan(track: _Track, config: VisionConfig) -> VideoPlan:
    stamps_s, height, width = track.times_s, track.height, track.width
    chosen = choose_frames(len(stamps_s), _rate(stamps_s), config.max_frames)
    step = config.temporal_patch_size
    pairs = math.ceil(len(chosen) / step)
    start = stamps_s[0]
    return VideoPlan(
        frames=chosen,
        times_s=tuple(stamps_s[chosen[i * step]] - start for i in range(pairs)),
        grid=(pairs, *fit_frames(height, width, pairs, config)),
    )


def fit_frames(height: int, width: int, pairs: int, config: VisionConfig) -> tuple[int, int]:
    """(patch rows, patch columns) of a frame where the pairs of a clip share its budget of patches."""
    budget = max(config.min_patches, config.max_patches // pairs)
    height, width = fit_size(height, width, config, max_patches=max(budget, _floor_patches(config)))
    return height // config.patch_size, width // config.patch_size


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
    track = _read_track(raw, name)
    plan = _plan(track, config)
    size = plan.grid[1] * config.patch_size, plan.grid[2] * config.patch_size
    kept = [resize(frame, size) for frame in _wanted_frames(raw, name, track, plan.frames)]
    if len(kept) != len(plan.frames):
        raise MediaError(f"{name} promises frame {plan.frames[-1]} and cannot be decoded that far; export it again")
    missing = -len(kept) % config.temporal_patch_size
    return np.stack(kept + [kept[-1]] * missing)


def video_extent(raw: bytes, name: str) -> tuple[int, int, int]:
    """(frames, height, width) of a clip, from its packets' headers; nothing is decoded.

    Raises:
        MediaError: as :func:`plan_video`.
    """
    track = _read_track(raw, name)
    return len(track.times_s), track.height, track.width


def frame_times(raw: bytes, name: str) -> tuple[list[float], int, int]:
    """(when each frame is shown in seconds from the first, height, width) of a clip; nothing is decoded.

    Raises:
        MediaError: as :func:`plan_video`.
    """
    track = _read_track(raw, name)
    return [time_s - track.times_s[0] for time_s in track.times_s], track.height, track.width


def frames_at(raw: bytes, name: str, numbers: Sequence[int], size: tuple[int, int]) -> dict[int, NDArray[np.uint8]]:
    """Frames by number, each [h, w, 3] at a final size.

    Raises:
        MediaError: as :func:`video_frames`.
    """
    wanted = tuple(sorted(set(numbers)))
    found = [resize(frame, size) for frame in _wanted_frames(raw, name, _read_track(raw, name), wanted)]
    if len(found) != len(wanted):
        raise MediaError(f"{name} promises frame {wanted[-1]} and cannot be decoded that far; export it again")
    return dict(zip(wanted, found, strict=True))


def plan_frames_at_rate(raw: bytes, name: str, fps: float) -> tuple[list[int], list[float]]:
    """Frame numbers about ``fps`` a second from the first on, and when they are shown, in seconds.

    Raises:
        MediaError: as :func:`plan_video`.
    """
    track = _read_track(raw, name)
    start = track.times_s[0]
    step = max(1, round(_rate(track.times_s) / fps))
    numbers = list(range(0, len(track.times_s), step))
    return numbers, [track.times_s[number] - start for number in numbers]


def choose_frames(count: int, fps: float, most: int) -> tuple[int, ...]:
    """Frame numbers at the middles of equal segments of the clip.

    The clip is cut into duration * 2 FPS segments; where that gives fewer than 16, the rate rises up to 4 FPS; never
    more than ``most`` and never more than there are. A clip of at most 16 frames is looked at whole.

    Source: networks.md section 1, video.
    """
    if count <= min(LEAST_FRAMES, most):
        return tuple(range(count))
    duration_s = count / fps
    wanted = max(duration_s * DEFAULT_FPS, min(LEAST_FRAMES, duration_s * MOST_FPS))
    total = max(1, min(count, most, round(wanted)))
    return tuple(math.floor((i + 0.5) * count / total) for i in range(total))


def decode_frames(raw: bytes, name: str) -> Iterator[NDArray[np.uint8]]:
    """Every frame of the first video track, [H, W, 3] uint8, in the order they are shown."""
    rgb = _rgb_converter()
    for frame in _decoded(raw, name, None):
        yield rgb(frame)


def _wanted_frames(raw: bytes, name: str, track: _Track, wanted: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """The frames of these ascending numbers; stops at the first that does not come."""
    rgb = _rgb_converter()
    if len(track.times_s) <= _SEEK_FRAMES or not track.seekable:
        numbers = set(wanted)
        frames = _decoded_packets(track.opened.pop(), name) if track.opened else _decoded(raw, name, None)
        for number, frame in enumerate(frames):
            if number in numbers:
                yield rgb(frame)
            if number >= wanted[-1]:
                return
        return
    stamps = [track.stamps[number] for number in wanted]
    while stamps:
        start = track.keys[bisect_right(track.keys, stamps[0]) - 1]
        for frame in _decoded(raw, name, start):
            if frame.pts is not None and frame.pts >= stamps[0]:
                if frame.pts != stamps[0]:
                    return
                yield rgb(frame)
                stamps.pop(0)
                # Further on than the next key frame, seeking is cheaper than decoding.
                if not stamps or bisect_right(track.keys, stamps[0]) > bisect_right(track.keys, frame.pts) + 1:
                    break
        else:
            return


def _rgb_converter() -> Callable[[Any], NDArray[np.uint8]]:
    """[H, W, 3] of a frame; one converter a film and one thread, where the library would make both anew each frame."""
    from av.video.reformatter import VideoReformatter

    converter: Any = VideoReformatter()
    return lambda frame: np.asarray(converter.reformat(frame, format="rgb24", threads=1).to_ndarray(), dtype=np.uint8)


def _decoded(raw: bytes, name: str, start: int | None) -> Iterator[Any]:
    """Frames as the library gives them, from the start or from a key frame's time stamp; one thread."""
    import av

    try:
        with av.open(io.BytesIO(raw), "r") as container:
            stream = _stream(container, name)
            stream.codec_context.thread_count = 1
            if start is not None:
                container.seek(start, stream=stream)
            for frame in container.decode(stream):
                yield _checked_frame(frame, name)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MediaError(f"{name} cannot be decoded as video ({reason(error)}); send mp4 with h264") from error


def _decoded_packets(opened: _Opened, name: str) -> Iterator[Any]:
    """Every frame of a film whose packets were read already: what :func:`_decoded` gives from the start."""
    import av

    try:
        opened.stream.codec_context.thread_count = 1
        for packet in opened.packets:
            for frame in packet.decode():
                yield _checked_frame(frame, name)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MediaError(f"{name} cannot be decoded as video ({reason(error)}); send mp4 with h264") from error
    finally:
        opened.container.close()


def _checked_frame(frame: Any, name: str) -> Any:
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"{name} has frames of {frame.width} x {frame.height} pixels; scale it down")
    return frame


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A short film whose packets were read and not yet decoded."""

    container: Any
    stream: Any
    packets: list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Track:
    """What a film's packets tell without being decoded."""

    times_s: list[float]
    """When each frame is shown, ascending."""
    stamps: list[int]
    """The same in the track's own unit."""
    keys: list[int]
    """Time stamps of key frames, ascending."""
    height: int
    width: int
    opened: list[_Opened] = field(default_factory=list)
    """The film itself, once: opening it and reading its packets again would cost a tenth of decoding it."""

    @property
    def seekable(self) -> bool:
        """Whether every frame is named by its time stamp and the first is a key frame."""
        return bool(self.keys) and self.keys[0] == self.stamps[0] and len(set(self.stamps)) == len(self.stamps)


_last = LastRead[_Track]()


def _read_track(raw: bytes, name: str) -> _Track:
    """Time stamps and size of the first video track; packets are read, not decoded."""
    return _last.get(raw, lambda: _scan_track(raw, name))


def _scan_track(raw: bytes, name: str) -> _Track:
    import av

    container = None
    try:
        container = av.open(io.BytesIO(raw), "r")
        track = _scanned(container, raw, name)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MediaError(f"{name} cannot be read as video ({reason(error)}); send mp4 with h264") from error
    except MediaError:
        if container is not None:
            container.close()
        raise
    if not track.opened:
        container.close()
    return track


def _scanned(container: Any, raw: bytes, name: str) -> _Track:
    stream = _stream(container, name)
    height, width = int(stream.codec_context.height), int(stream.codec_context.width)
    base = float(stream.time_base or 0)
    _check_duration(container, stream, name)
    stamps, keys, packets = [], [], []
    for packet in container.demux(stream):
        if len(raw) <= _OPEN_BYTES:
            packets.append(packet)
        if packet.pts is not None and packet.size:
            stamps.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        if len(stamps) > MAX_SOURCE_FRAMES:
            raise MediaError(f"{name} has more than {MAX_SOURCE_FRAMES} frames; cut it into pieces")
    if not stamps or height < 1 or width < 1:
        raise MediaError(f"{name} has a video track without frames; export it again")
    if height * width > MAX_PIXELS:
        raise MediaError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}; scale it down")
    stamps.sort()
    if (stamps[-1] - stamps[0]) * base > MAX_VIDEO_S:
        raise _too_long((stamps[-1] - stamps[0]) * base, name)
    times_s = [stamp * base for stamp in stamps]
    opened = [_Opened(container=container, stream=stream, packets=packets)] if packets else []
    return _Track(times_s=times_s, stamps=stamps, keys=sorted(keys), height=height, width=width, opened=opened)


def _check_duration(container: Any, stream: Any, name: str) -> None:
    """Refuse a film that its header calls too long, before its packets are read."""
    lasts_s = max(
        float((stream.duration or 0) * (stream.time_base or 0)),
        float(container.duration or 0) / 1e6,
    )
    if lasts_s > MAX_VIDEO_S:
        raise _too_long(lasts_s, name)


def _too_long(lasts_s: float, name: str) -> MediaError:
    return MediaError(f"{name} lasts {lasts_s:.0f} s, more than {MAX_VIDEO_S:g} s; cut it into pieces")


def _stream(container: Any, name: str) -> Any:
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
