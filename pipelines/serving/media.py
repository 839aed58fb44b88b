"""The one way in for media: data URIs and base64 to bytes whose size in pixels, seconds and frames is known to fit.

Nothing is fetched unless the recipe allows a host (fetch.py): remote addresses and file paths are refused.  Containers
are recognised by their first bytes before a decoder sees them, because decoders that guess would also follow play lists
to other files and hosts.
"""

from __future__ import annotations

import base64
import binascii
import io

from omni_ray.config.serving import Limits
from omni_ray.data.audio import count_samples
from omni_ray.data.image import image_size
from omni_ray.data.video import video_extent
from omni_ray.types.errors import MediaError
from pipelines.serving.errors import ApiError, bad_request
from pipelines.serving.fetch import fetch

MAX_SOUND_VALUES = 24_000_000
"""Samples over all channels: 120 s of stereo at 96 kHz; what a small file may unfold to."""
MAX_VIDEO_PIXELS = 4_000_000_000
"""Pixels over all frames of a film: about a minute of full HD."""
_RATE_HZ = 16000


def image_bytes(url: str, where: str, limits: Limits) -> bytes:
    """A picture's bytes.

    Args:
        url: Data URI.  where: The part, for the error.  limits: What one request may ask for.
    Raises:
        ApiError: 400, names the part.
    """
    raw = read_url(url, where, "image", limits)
    try:
        height, width = image_size(raw, where)
    except MediaError as error:
        raise unreadable(error, where) from None
    if height * width > limits.max_image_pixels:
        raise bad_request(
            f"{where} has {width} x {height} pixels, more than {limits.max_image_pixels}; scale it down", param=where
        )
    return raw


def audio_bytes(data: str, form: str, where: str, limits: Limits) -> bytes:
    """A sound's bytes; ``form`` is wav, mp3, flac or ogg and must be what the bytes are.

    Raises:
        ApiError: 400, names the part.
    """
    raw = read_base64(data, where)
    found = sound_form(raw)
    if found != form:
        what = f"its bytes are {found}" if found else "its bytes are none of wav, mp3, flac, ogg"
        raise bad_request(f"{where} says {form}, yet {what}; send the sound as it says", param=where)
    try:
        _check_values(raw, where)
        seconds = count_samples(raw, where, _RATE_HZ) / _RATE_HZ
    except MediaError as error:
        raise unreadable(error, where) from None
    if seconds > limits.max_audio_s:
        raise bad_request(f"{where} lasts {seconds:.1f} s, more than {limits.max_audio_s:g} s; cut it", param=where)
    return raw


def sound_bytes_checked(raw: bytes, where: str, limits: Limits) -> float:
    """Check an uploaded sound; its seconds.

    Raises:
        ApiError: 400, names the field.
    """
    if not raw:
        raise bad_request(f"{where} is empty; send the sound's bytes", param=where)
    if sound_form(raw) is None:
        raise bad_request(f"{where} is none of wav, mp3, flac, ogg; convert it", param=where, code="unreadable_media")
    try:
        _check_values(raw, where)
        seconds = count_samples(raw, where, _RATE_HZ) / _RATE_HZ
    except MediaError as error:
        raise unreadable(error, where) from None
    if seconds > limits.max_audio_s:
        raise bad_request(f"{where} lasts {seconds:.1f} s, more than {limits.max_audio_s:g} s; cut it", param=where)
    return seconds


def video_bytes(url: str, where: str, limits: Limits) -> bytes:
    """A film's bytes (mp4, mov, webm or mkv).

    Raises:
        ApiError: 400, names the part.
    """
    raw = read_url(url, where, "video", limits)
    if raw[4:8] != b"ftyp" and raw[:4] != b"\x1a\x45\xdf\xa3":
        raise bad_request(f"{where} is not a film that can be read; send mp4, mov or webm", param=where)
    try:
        frames, height, width = video_extent(raw, where)
    except MediaError as error:
        raise unreadable(error, where) from None
    if frames > limits.max_video_frames:
        raise bad_request(
            f"{where} has {frames} frames, more than {limits.max_video_frames}; cut it or lower its frame rate",
            param=where,
        )
    if height * width > limits.max_image_pixels or frames * height * width > MAX_VIDEO_PIXELS:
        raise bad_request(f"{where} has {frames} frames of {width} x {height} pixels; scale it down", param=where)
    return raw


def read_url(url: str, where: str, kind: str, limits: Limits) -> bytes:
    """Bytes of a data URI, or of an address where fetching is allowed.

    Raises:
        ApiError: 400, names the part.
    """
    if limits.fetch.enabled and url[:5].lower() != "data:":
        return fetch(url, where, limits.fetch)
    return read_data_uri(url, where, kind)


def read_data_uri(url: str, where: str, kind: str) -> bytes:
    """Bytes of ``data:KIND/...;base64,...``.

    Raises:
        ApiError: 400: another scheme (nothing is fetched), another kind of media, or no base64.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data" or not rest:
        named = f"a {scheme.lower()} address" if 0 < len(scheme) <= 12 and rest else "no data URI"
        raise bad_request(
            f"{where} is {named}; this server fetches nothing, send the bytes as data:{kind}/...;base64,...",
            param=where,
            code="remote_media_refused",
        )
    header, comma, payload = rest.partition(",")
    words = header.lower().split(";")
    if not comma or "base64" not in words[1:]:
        raise bad_request(f"{where} is not a base64 data URI; send data:{kind}/...;base64,...", param=where)
    if not words[0].startswith(f"{kind}/"):
        raise bad_request(f"{where} holds {words[0][:40] or 'no type'}, where {kind}/... is due", param=where)
    return read_base64(payload, where)


def read_base64(text: str, where: str) -> bytes:
    """Decode base64 without garbage.

    Raises:
        ApiError: 400, names the part.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{where} is not base64; encode the file's bytes without line breaks", param=where) from None
    if not raw:
        raise bad_request(f"{where} is empty; send the file's bytes", param=where)
    return raw


def sound_form(raw: bytes) -> str | None:
    """wav, flac, ogg or mp3 by the first bytes, else None."""
    if raw[:4] in (b"RIFF", b"RF64") and raw[8:12] == b"WAVE":
        return "wav"
    if raw[:4] == b"fLaC":
        return "flac"
    if raw[:4] == b"OggS":
        return "ogg"
    return "mp3" if _is_mp3(raw) else None


def unreadable(error: Exception, where: str) -> ApiError:
    """A decoder's refusal as a 400 that names the part."""
    return bad_request(str(error), param=where, code="unreadable_media")


def _is_mp3(raw: bytes) -> bool:
    """MPEG audio frame, after an ID3 tag (and its padding) if there is one; a tag alone may hide anything."""
    start = 0
    if raw[:3] == b"ID3" and len(raw) > 10:
        size = 0
        for byte in raw[6:10]:
            size = size << 7 | byte & 0x7F
        start = 10 + size
        while start < len(raw) and raw[start] == 0:
            start += 1
    return len(raw) > start + 4 and raw[start] == 0xFF and raw[start + 1] & 0xE0 == 0xE0


def _check_values(raw: bytes, where: str) -> None:
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(raw))
    except (soundfile.LibsndfileError, RuntimeError):
        raise MediaError(f"{where} cannot be decoded as sound; send wav, mp3, flac or ogg") from None
    if info.frames * info.channels > MAX_SOUND_VALUES:
        raise MediaError(
            f"{where} holds {info.frames} samples in each of {info.channels} channels, together more than "
            f"{MAX_SOUND_VALUES}; send one channel at 16 kHz"
        )
