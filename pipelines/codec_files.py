"""Sound files to files of codec ids and back: what ``omni-ray codec`` does."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from omni_ray.models.codec import Codec

LONGEST_S = 24 * 3600.0
"""Longest recording of one call; it is read, coded and written in pieces, so memory does not feel its length."""
WHOLE_S = 1800.0
"""Longest sound track of a video, which is decoded whole: half an hour of stereo at 48 kHz takes 0.7 GB."""
DECODE_FRAMES = 512
"""Frames of sound written at a time (31 s)."""
SOUND_SUFFIXES = (".wav", ".flac", ".ogg")
CODES_SUFFIX = ".npz"


def shipped_codec() -> Path:
    """The folder of the codec that comes with the package."""
    return Path(str(resources.files("omni_ray").joinpath("assets", "codec")))


def load_codec(folder: Path | None) -> tuple[Codec, str]:
    """A codec and the hash of its weights, which its codes carry.

    Args:
        folder: Of ``Codec.save_pretrained``; None for the shipped one.
    Raises:
        CheckpointError: no codec lies there.
    """
    folder = folder or shipped_codec()
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            f"{folder} holds no codec (model.safetensors is missing); name another folder with --codec"
        )
    from omni_ray.models.codec import Codec

    return Codec.from_pretrained(folder), hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def encode_file(source: Path, target: Path, *, codec: Path | None = None) -> dict[str, Any]:
    """Write the codes of a sound file (wav, flac, ogg, mp3, or a video's sound track) as ``.npz``.

    Returns:
        seconds, frames, codebooks, bits_per_second.
    Raises:
        MediaError: the sound cannot be read.  DataError: the target is not named ``.npz``.
    """
    _check_suffix(target, (CODES_SUFFIX,))
    network, fingerprint = load_codec(codec)
    codes_NK, seconds = _encoded(source, network)
    out = io.BytesIO()
    np.savez(out, codes=codes_NK.astype(np.int32), codec=np.array(fingerprint))
    _write_whole(target, lambda aside: aside.write_bytes(out.getvalue()))
    return {
        "seconds": seconds,
        "frames": len(codes_NK),
        "codebooks": codes_NK.shape[1],
        "bits_per_second": network.bits_per_second(),
    }


def decode_file(
    source: Path, target: Path, *, codec: Path | None = None, codebooks: int | None = None
) -> dict[str, Any]:
    """Write the sound of a file of codes.

    Args:
        codebooks: Use the first 2..4 only: a coarser sound for fewer bits.
    Returns:
        seconds, frames, codebooks, sample_rate_hz.
    Raises:
        DataError: no file of codes, or codes of another codec; the target has no suffix of a sound file.
    """
    _check_suffix(target, SOUND_SUFFIXES)
    network, fingerprint = load_codec(codec)
    codes_NK, made_by = read_codes(source)
    if made_by != fingerprint:
        raise DataError(
            f"{source} was made by codec {made_by}, this one is {fingerprint}; name its folder with --codec"
        )
    return _decoded(codes_NK[:, : codebooks or codes_NK.shape[1]], target, network)


def reconstruct_file(
    source: Path, target: Path, *, codec: Path | None = None, codebooks: int | None = None
) -> dict[str, Any]:
    """Encode and decode a sound file, to hear what the codec keeps.

    Returns:
        seconds, frames, codebooks, sample_rate_hz.
    """
    _check_suffix(target, SOUND_SUFFIXES)
    network, _ = load_codec(codec)
    codes_NK, _ = _encoded(source, network)
    return _decoded(codes_NK[:, : codebooks or codes_NK.shape[1]], target, network)


def read_codes(path: Path) -> tuple[NDArray[np.int64], str]:
    """Codes [N, K] and the hash of the codec that made them.

    Raises:
        DataError: not a file of :func:`encode_file`.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            codes = stored["codes"]
            if not np.issubdtype(codes.dtype, np.integer) or codes.ndim != 2:
                raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}")
            return codes.astype(np.int64), str(stored["codec"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise DataError(f"{path} is no file of codec ids; make one with omni-ray codec encode") from problem


def _encoded(source: Path, network: Codec) -> tuple[NDArray[np.int64], float]:
    """Codes [N, K] of a file, and its seconds."""
    import torch

    from omni_ray.data.audio_blocks import SoundFile

    rate_hz = network.config.sample_rate_hz
    sound = SoundFile(source, longest_s=LONGEST_S, whole_s=WHOLE_S, fallback_hz=rate_hz)
    samples = 0

    def blocks() -> Iterator[torch.Tensor]:
        nonlocal samples
        for block_S in sound.blocks():
            samples += len(block_S)
            # Louder than full scale can be stored in a float file; the codec's network was never shown it.
            yield torch.from_numpy(block_S).clamp(-1.0, 1.0)

    codes_NK: NDArray[np.int64] = torch.cat(list(network.encode_blocks(blocks(), sound.rate_hz))).numpy()
    return codes_NK, samples / sound.rate_hz


def _decoded(codes_NK: NDArray[Any], target: Path, network: Codec) -> dict[str, Any]:
    """Write the sound of codes, a piece at a time."""
    import soundfile

    rate_hz, samples = network.config.output_rate_hz, 0
    codes = network.checked_codes(codes_NK)

    def write(aside: Path) -> None:
        nonlocal samples
        form, stream = target.suffix[1:].upper(), network.stream()
        with soundfile.SoundFile(str(aside), "w", samplerate=rate_hz, channels=1, format=form) as out:
            for first in range(0, len(codes), DECODE_FRAMES):
                out.write(stream.push(codes[first : first + DECODE_FRAMES]).clamp(-1.0, 1.0).numpy())
            out.write(stream.flush().clamp(-1.0, 1.0).numpy())
            samples = out.frames

    _write_whole(target, write)
    return {
        "seconds": samples / rate_hz,
        "frames": len(codes_NK),
        "codebooks": codes_NK.shape[1],
        "bits_per_second": network.bits_per_second(codes_NK.shape[1]),
        "sample_rate_hz": rate_hz,
    }


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{path.name} is to be written, yet only {', '.join(suffixes)} can be; rename OUT")


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file be written aside, then put it in its place: it is there whole or not at all."""
    import soundfile

    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        aside.replace(path)
    except (OSError, soundfile.LibsndfileError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise DataError(f"{path} cannot be written ({why})") from problem
    finally:
        aside.unlink(missing_ok=True)
