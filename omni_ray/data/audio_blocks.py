"""A sound file of any length as mono blocks, in memory that does not grow with it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from omni_ray.data.audio import Wave, check_length, check_whole_wav, decode_audio
from omni_ray.types.errors import MediaError

BLOCK_S = 10.0


class SoundFile:
    """Blocks of a wav, flac, ogg or mp3; other containers (a video's sound track) are decoded whole.

    Args:
        longest_s: Longer sounds are refused.  whole_s: The same for containers that cannot be read in blocks.
        fallback_hz: Rate that those are brought to.
    Raises:
        MediaError: no sound can be read, it is empty, cut short, too long, or holds values that are not finite.
    """

    def __init__(self, path: Path, *, longest_s: float, whole_s: float, fallback_hz: int) -> None:
        import soundfile

        self.path, self.name = path, path.name
        self._whole: Wave | None = None
        self._check_readable()
        try:
            info = soundfile.info(str(path))
        except (soundfile.LibsndfileError, RuntimeError):
            raw = path.read_bytes()
            self._whole = decode_audio(raw, self.name, fallback_hz, longest_s=min(whole_s, longest_s))
            self.rate_hz = fallback_hz
            return
        check_length(info.frames, info.samplerate, self.name, longest_s)
        self.rate_hz, self._promised = int(info.samplerate), int(info.frames)

    def _check_readable(self) -> None:
        try:
            with self.path.open("rb") as stream:
                if self.path.stat().st_size:
                    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                        check_whole_wav(raw, self.name)
        except OSError as problem:
            raise MediaError(f"{self.path} cannot be read ({problem.strerror})") from problem

    def blocks(self) -> Iterator[Wave]:
        """Mono blocks [S] float32 at ``rate_hz``; channels are averaged."""
        if self._whole is not None:
            yield self._whole
            return
        import soundfile

        taken = 0
        try:
            with soundfile.SoundFile(str(self.path)) as sound:
                # Not SoundFile.blocks: at a file's unpromised end that gives stale samples for those that are missing.
                while len(block := sound.read(round(BLOCK_S * self.rate_hz), dtype="float32", always_2d=True)):
                    mono: Wave = block.mean(axis=1, dtype=np.float32)
                    if not np.isfinite(mono).all():
                        raise MediaError(f"{self.name} has samples that are not finite; export it again")
                    taken += len(mono)
                    yield mono
        except (soundfile.LibsndfileError, RuntimeError) as problem:
            raise MediaError(f"{self.name} is damaged after {taken / self.rate_hz:.1f} s; export it again") from problem
        if taken != self._promised:
            raise MediaError(f"{self.name} is cut short: {taken} of {self._promised} samples; export it again")
