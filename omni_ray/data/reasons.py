"""Why a library could not read something, in its own words."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """The sentence of an error; of FFmpeg's without the number and the place, which is memory."""
    return str(getattr(error, "strerror", None) or error)
