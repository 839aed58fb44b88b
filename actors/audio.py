"""The audio worker: sound to rows of the language sequence, 80 ms a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.worker import EncoderWorker


class AudioWorker(EncoderWorker):
    """Owns the streaming FSMN audio encoder and its projector."""

    network_name = "audio"

    def encode(self, media: Sequence[NDArray]) -> tuple[Tensor, tuple[int, ...]]:
        """Encode utterances: float32 waves [S] at 16 kHz."""
        rows_ID, lengths = self.network([torch.from_numpy(wave.copy()) for wave in media])
        return rows_ID, tuple(int(length) for length in lengths)
