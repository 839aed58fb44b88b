"""Patch merging and the vision projector."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from omni_ray.config.model import VisionConfig
from omni_ray.models.projector import Grid, VisionProjector, merge_patches, merged_tokens, shrink_tokens
from omni_ray.types.errors import MediaError

GRIDS: list[Grid] = [(1, 2, 4), (2, 4, 2)]


def numbered(grids: list[Grid]) -> torch.Tensor:
    """Feature rows [P, 4] that say where they come from: item, frame pair, row, column."""
    rows = [
        [i, t, y, x]
        for i, (frames, height, width) in enumerate(grids)
        for t in range(frames)
        for y in range(height)
        for x in range(width)
    ]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("merge", [(1, 2), (2, 2), (2, 1)], ids=str)
def test_merge_joins_each_rectangle_in_raster_order(merge: tuple[int, int]) -> None:
    expected = [
        [value for dy in range(merge[0]) for dx in range(merge[1]) for value in (i, t, y + dy, x + dx)]
        for i, (frames, height, width) in enumerate(GRIDS)
        for t in range(frames)
        for y in range(0, height, merge[0])
        for x in range(0, width, merge[1])
    ]
    merged = merge_patches(numbered(GRIDS), GRIDS, merge)
    assert merged.tolist() == expected
    assert len(merged) == sum(merged_tokens(grid, merge) for grid in GRIDS)


def test_a_grid_that_cannot_be_joined_is_refused() -> None:
    with pytest.raises(MediaError, match="a grid of 3 x 4 patches cannot be joined 2 x 2"):
        merge_patches(torch.zeros(12, 4), [(1, 3, 4)], (2, 2))


@pytest.mark.parametrize("linears", [2, 3])
@pytest.mark.parametrize("merge", [(1, 2), (2, 2)], ids=str)
def test_projector_equals_its_equation(linears: Literal[2, 3], merge: tuple[int, int]) -> None:
    config = VisionConfig(
        hidden_size=8, num_heads=2, merge=merge, adaptor_dim=12, output_size=6, projector_linears=linears
    )
    torch.manual_seed(0)
    projector = VisionProjector(config)
    features = torch.randn(24, 8)
    weights = projector.state_dict()
    x = merge_patches(features, GRIDS, merge)
    x = F.layer_norm(x, (8 * merge[0] * merge[1],), weights["p0.0.weight"], weights["p0.0.bias"])
    for name in ("p0.1", "p0.3")[: linears - 1]:
        x = F.gelu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    expected = x @ weights["proj.weight"].T + weights["proj.bias"]
    torch.testing.assert_close(projector(features, GRIDS), expected)


@pytest.mark.parametrize("max_tokens", [1000, 64, 63, 40, 17, 4])
def test_shrunk_video_fits_and_keeps_a_constant_picture(max_tokens: int) -> None:
    grid: Grid = (4, 4, 8)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(16)[:, None].expand(64, 3)
    tokens, (frames, rows, columns) = shrink_tokens(values, grid, (1, 2), max_tokens)
    assert len(tokens) == frames * rows * columns <= max_tokens
    assert frames == 4
    torch.testing.assert_close(tokens.view(4, rows * columns, 3).mean(1)[:, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    if max_tokens >= 64:
        assert tokens is values


def test_more_frame_pairs_than_tokens_are_refused() -> None:
    with pytest.raises(MediaError, match="5 frame pairs cannot fit 4 visual tokens"):
        shrink_tokens(torch.zeros(20, 3), (5, 2, 4), (1, 2), 4)
