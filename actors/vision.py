"""The vision worker: pictures and frame pairs to rows of the language sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.worker import EncoderWorker
from omni_ray.data.media import patch_rows
from omni_ray.models.vision_encoder import VisionEncoder


class VisionWorker(EncoderWorker):
    """Owns LongCat-ViT and its projector."""

    network_name = "vision"
    network: VisionEncoder

    def encode(self, media: Sequence[NDArray]) -> tuple[Tensor, tuple[int, ...]]:
        """Encode frame pairs.

        Args:
            media: uint8 frames [1 or 2, h, w, 3] at their final size; a single frame is an image, repeated along time.
        """
        rows_PC, grids = patch_rows(media, self.network.config)
        patches_PC = torch.from_numpy(rows_PC).to(self.device)
        return self.network(patches_PC, grids), tuple(self.network.tokens(grid) for grid in grids)

    @torch.no_grad()
    def features(self, media: Sequence[NDArray]) -> list[Tensor]:
        """Rows [n, D] of every item, for serving; together where the encoder gives the same bits so (fp32 on CPU)."""
        weight = self.network.vit.embeddings.patch_embedding.weight
        if not media or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return super().features(media)
        rows_ND, lengths = self.encode(media)
        return list(rows_ND.split(list(lengths)))
