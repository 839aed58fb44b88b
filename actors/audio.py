"""The audio worker: sound to rows of the language sequence, 80 ms a row."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import NDArray
from torch import Tensor

from actors.worker import EncoderWorker
from omni_ray.data.media import sound_rows
from omni_ray.types.sample import SoundPart


class AudioWorker(EncoderWorker):
    """Owns the streaming FSMN audio encoder and its projector."""

    network_name = "audio"

    def encode(self, media: Sequence[NDArray | SoundPart]) -> tuple[Tensor, tuple[int, ...]]:
        """Encode utterances: float32 waves [S] at 16 kHz, or stretches of them."""
        return sound_rows(self.network, media)
