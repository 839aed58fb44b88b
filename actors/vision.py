"""The vision worker: pictures and frame pairs to rows of the language sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.worker import EncoderWorker
from omni_ray.data.image import patchify


class VisionWorker(EncoderWorker):
    """Owns LongCat-ViT and its projector."""

    network_name = "vision"

    def encode(self, media: Sequence[NDArray]) -> tuple[Tensor, tuple[int, ...]]:
        """Encode frame pairs.

        Args:
            media: uint8 frames [1 or 2, h, w, 3] at their final size; a single frame is an image, repeated along time.
        """
        config = self.network.config
        patched = [patchify(frames, config) for frames in media]
        rows_PC = torch.cat([rows for rows, _ in patched])
        grids = [grid for _, grid in patched]
        return self.network(rows_PC, grids), tuple(self.network.tokens(grid) for grid in grids)
