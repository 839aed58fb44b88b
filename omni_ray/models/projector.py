"""Vision projector: joins neighbouring patches and maps them into the language width (networks.md section 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_ray.config.model import VisionConfig
from omni_ray.models.fused_linear import linear
from omni_ray.models.layers import row_padded
from omni_ray.types.errors import MediaError

Grid = tuple[int, int, int]
"""One item's patches: frame pairs t, patch rows h, patch columns w."""


def merged_tokens(grid: Grid, merge: tuple[int, int]) -> int:
    """Tokens that an item gives after patches are joined.

    Raises:
        MediaError: the grid cannot be divided by the merge.
    """
    frames, height, width = grid
    if height % merge[0] or width % merge[1]:
        raise MediaError(
            f"a grid of {height} x {width} patches cannot be joined {merge[0]} x {merge[1]}; "
            f"resize the picture to a multiple of {merge[0]} x {merge[1]} patches"
        )
    return frames * (height // merge[0]) * (width // merge[1])


def merge_patches(features_PD: Tensor, grids: Sequence[Grid], merge: tuple[int, int]) -> Tensor:
    """Join each ``merge`` rectangle of patches into one row (pixel-unshuffle).

    Args:
        features_PD: [patches, D], items in order, frame pairs and then raster order inside an item.
        grids: (t, h, w) of every item.
        merge: Patch rows and columns of a rectangle; (1, 2) joins horizontal neighbours.
    Returns:
        [tokens, D * rows * columns]; a row holds its patches in raster order.
    Raises:
        MediaError: a grid that the merge does not divide.
    Source: LongCat-Flash-Omni report (2x pixel-unshuffle); published demo code (two horizontal neighbours).
    """
    rows, columns = merge
    tokens = [merged_tokens(grid, merge) for grid in grids]
    size = features_PD.shape[-1]
    if rows == 1:
        # Neighbours are already next to each other in raster order: a view, for any mixture of grids.
        return features_PD.reshape(sum(tokens), columns * size)
    pieces = []
    for item_PD, (frames, height, width) in zip(
        features_PD.split([math.prod(grid) for grid in grids]), grids, strict=True
    ):
        blocks = item_PD.view(frames, height // rows, rows, width // columns, columns, size)
        pieces.append(blocks.transpose(2, 3).reshape(-1, rows * columns * size))
    return torch.cat(pieces) if pieces else features_PD.new_empty(0, rows * columns * size)


def shrink_tokens(tokens_TH: Tensor, grid: Grid, merge: tuple[int, int], max_tokens: int) -> tuple[Tensor, Grid]:
    """Bilinearly shrink the token grids of one long video until they number at most ``max_tokens``.

    Args:
        tokens_TH: Projector output [tokens, H] of the video.
        grid: (t, h, w) in patches.
        merge: The merge that made the tokens.
        max_tokens: Visual tokens allowed.
    Returns:
        The tokens and their grid (t, rows, columns) counted in tokens; unchanged tokens if they fit already.
    Raises:
        MediaError: fewer tokens are allowed than frame pairs exist.
    Source: LongCat-Flash-Omni report and published demo code: each frame grid is resized to about tokens / r with
        r = total / max. Both sides shrink by about sqrt(r) and are floored, so that the total never passes the limit.
    """
    total = merged_tokens(grid, merge)
    frames, rows, columns = grid[0], grid[1] // merge[0], grid[2] // merge[1]
    if total <= max_tokens:
        return tokens_TH, (frames, rows, columns)
    if frames > max_tokens:
        raise MediaError(f"{frames} frame pairs cannot fit {max_tokens} visual tokens; sample fewer frames")
    area = max_tokens // frames
    new_rows = min(rows, area, max(1, math.floor(math.sqrt(area * rows / columns))))
    new_columns = min(columns, area // new_rows)
    image = tokens_TH.view(frames, rows, columns, -1).permute(0, 3, 1, 2)
    small = F.interpolate(image.float(), size=(new_rows, new_columns), mode="bilinear", align_corners=False)
    shrunk = small.permute(0, 2, 3, 1).reshape(frames * new_rows * new_columns, -1)
    return shrunk.to(tokens_TH.dtype), (frames, new_rows, new_columns)


class VisionProjector(nn.Module):
    """LayerNorm, then two or three linears with GELU between, over joined patches.

    Names as published: ``p0.0`` LayerNorm, ``p0.1`` and (three linears) ``p0.3`` Linear, ``proj`` the last one.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merge = config.merge
        joined = config.hidden_size * config.merge[0] * config.merge[1]
        inner = config.adaptor_dim
        layers: list[nn.Module] = [nn.LayerNorm(joined), nn.Linear(joined, inner), nn.GELU()]
        if config.projector_linears == 3:
            layers += [nn.Linear(inner, inner), nn.GELU()]
        self.p0 = nn.Sequential(*layers)
        self.proj = nn.Linear(inner, config.output_size)

    def forward(self, features_PD: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Map ViT features [patches, D] to language rows [tokens, output_size]."""
        return row_padded(self._rows, merge_patches(features_PD, grids, self.merge))

    def _rows(self, x_TJ: Tensor) -> Tensor:
        for layer in self.p0:
            x_TJ = linear(layer, x_TJ) if isinstance(layer, nn.Linear) else layer(x_TJ)
        return linear(self.proj, x_TJ)
