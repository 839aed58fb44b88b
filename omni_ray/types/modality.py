"""The modalities and the pools that own them."""

from __future__ import annotations

from enum import StrEnum


class Modality(StrEnum):
    """What a media item is, named after the pool that turns it into rows of the language sequence."""

    VISION = "vision"
    """Images and video frame pairs; features of the vision encoder."""
    AUDIO = "audio"
    """Sound to understand; features of the streaming audio encoder (80 ms a row)."""
    SPEECH = "speech"
    """Sound as codec ids (60 ms a row, four codebooks), in and out."""


FEATURE_MODALITIES: tuple[Modality, ...] = (Modality.VISION, Modality.AUDIO)
"""Modalities whose rows are real-valued features with gradients; speech rows are ids."""
