"""Sound files to files of codec ids and back: what ``omni-ray codec`` does."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.errors import CheckpointError, DataError, MediaError

if TYPE_CHECKING:
    from omni_ray.models.codec import Codec

LONGEST_S = 1800.0
"""Longest recording of one call: half an hour of stereo at 48 kHz takes 0.7 GB while it is read."""
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
    wave_S = _read_sound(source, network.config.sample_rate_hz)
    codes_NK = network.encode(wave_S, network.config.sample_rate_hz).numpy()
    out = io.BytesIO()
    np.savez(out, codes=codes_NK.astype(np.int32), codec=np.array(fingerprint))
    _write_whole(target, out.getvalue())
    return {
        "seconds": len(wave_S) / network.config.sample_rate_hz,
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
    codes_NK = codes_NK[:, : codebooks or codes_NK.shape[1]]
    wave_S = network.decode(codes_NK).numpy()
    _write_sound(target, wave_S, network.config.output_rate_hz)
    return _sound_facts(wave_S, codes_NK, network)


def reconstruct_file(
    source: Path, target: Path, *, codec: Path | None = None, codebooks: int | None = None
) -> dict[str, Any]:
    """Encode and decode a sound file, to hear what the codec keeps.

    Returns:
        seconds, frames, codebooks, sample_rate_hz.
    """
    _check_suffix(target, SOUND_SUFFIXES)
    network, _ = load_codec(codec)
    codes_NK = network.encode(_read_sound(source, network.config.sample_rate_hz), network.config.sample_rate_hz).numpy()
    codes_NK = codes_NK[:, : codebooks or codes_NK.shape[1]]
    wave_S = network.decode(codes_NK).numpy()
    _write_sound(target, wave_S, network.config.output_rate_hz)
    return _sound_facts(wave_S, codes_NK, network)


def read_codes(path: Path) -> tuple[NDArray[np.int64], str]:
    """Codes [N, K] and the hash of the codec that made them.

    Raises:
        DataError: not a file of :func:`encode_file`.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["codes"].astype(np.int64), str(stored["codec"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise DataError(f"{path} is no file of codec ids; make one with omni-ray codec encode") from problem


def _sound_facts(wave_S: NDArray[np.float32], codes_NK: NDArray[Any], network: Codec) -> dict[str, Any]:
    rate_hz = network.config.output_rate_hz
    return {
        "seconds": len(wave_S) / rate_hz,
        "frames": len(codes_NK),
        "codebooks": codes_NK.shape[1],
        "bits_per_second": network.bits_per_second(codes_NK.shape[1]),
        "sample_rate_hz": rate_hz,
    }


def _read_sound(path: Path, sample_rate_hz: int) -> NDArray[np.float32]:
    from omni_ray.data.audio import decode_audio

    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise MediaError(f"{path} cannot be read ({problem.strerror})") from problem
    return decode_audio(raw, path.name, sample_rate_hz, longest_s=LONGEST_S)


def _write_sound(path: Path, wave_S: NDArray[np.float32], sample_rate_hz: int) -> None:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.clip(wave_S, -1.0, 1.0), sample_rate_hz, format=path.suffix[1:].upper())
    _write_whole(path, out.getvalue())


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{path.name} is to be written, yet only {', '.join(suffixes)} can be; rename OUT")


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as problem:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({problem.strerror})") from problem
