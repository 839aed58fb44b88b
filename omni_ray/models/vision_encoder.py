"""LongCat-ViT: a native-resolution vision transformer and its projector (networks.md section 1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_ray.config.model import VisionConfig
from omni_ray.models.fused_linear import linear
from omni_ray.models.layers import ROW_TILE, RMSNorm
from omni_ray.models.pretrained import Pretrained
from omni_ray.models.projector import Grid, VisionProjector, merged_tokens
from omni_ray.models.streaming import item_runs
from omni_ray.models.vision_passes import PackedGrids, add_scaled, attend, gate_norm, norm
from omni_ray.types.errors import MediaError

MODEL_TYPE = "longcat_vit"
RUN_ROWS = 1024
"""Patches of one run without a graph on the CPU (measured: 512 to 2,048 are alike, all at once is 20 % slower)."""

# P packed patches (R in the order of windows), C values of a flattened patch, D hidden size, e angles of a head


def rope_angles(height: int, width: int, head_size: int, base: float) -> Tensor:
    """Angles of 2D-RoPE for one frame pair, [height * width, head_size / 2] fp32, patches in raster order.

    The first half of the angles turns with the patch row, the second with the column; there is no temporal position.

    Source: published demo code: inv_freq_i = base^(-2i / (d/2)) for i < d/4, angle = (row inv_freq, column inv_freq).
    """
    steps = torch.arange(0, head_size // 2, 2, dtype=torch.float32)
    inv_freq = base ** (-steps / (head_size // 2))
    rows = torch.arange(height, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float32).repeat(height)
    return torch.cat([torch.outer(rows, inv_freq), torch.outer(columns, inv_freq)], dim=-1)


def pack_grids(grids: Sequence[Grid], head_size: int, base: float, device: torch.device) -> PackedGrids:
    """Lay out attention windows and rotations for packed items.

    Args:
        grids: (t, h, w) of every item in patches.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    starts: list[tuple[int, int, int]] = []
    row = 0
    for frames, height, width in grids:
        for _ in range(frames):
            by_length[height * width].append(len(starts))
            starts.append((row, height, width))
            row += height * width
    tables = {(h, w): rope_angles(h, w, head_size, base) for _, h, w in set(grids)}
    sorted_windows = [index for length in sorted(by_length) for index in by_length[length]]
    angles = [tables[starts[index][1:]] for index in sorted_windows]
    angles_R1e = torch.cat(angles).unsqueeze(1).to(device) if angles else torch.empty(0, 1, head_size // 2).to(device)
    order_R = None
    if len(by_length) > 1:
        spans = [torch.arange(r, r + h * w) for r, h, w in (starts[index] for index in sorted_windows)]
        order_R = torch.cat(spans).to(device)
    windows = tuple((len(by_length[length]), length) for length in sorted(by_length))
    return PackedGrids(order_R, windows, angles_R1e.cos(), angles_R1e.sin())


class PatchEmbeddings(nn.Module):
    """One linear per patch, kept in the published form of a Conv3d with kernel = stride = (2, p, p)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(3, config.hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, patches_PC: Tensor) -> Tensor:
        """Embed flattened patches [P, 3 * 2 * p * p] (channel, time, row, column) as [P, D], in the weights' dtype."""
        conv = self.patch_embedding
        return F.linear(patches_PC.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)


class Attention(nn.Module):
    """Full attention inside each window: rotation, then RMSNorm over all heads jointly, then softmax."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.proj = nn.Linear(size, size)
        self.q_norm = RMSNorm(size, eps=config.norm_eps)
        self.k_norm = RMSNorm(size, eps=config.norm_eps)

    def forward(self, x_PD: Tensor, packed: PackedGrids) -> Tensor:
        """Mix the patches of each window; [P, D] to [P, D]."""
        return linear(self.proj, attend(linear(self.qkv, x_PD), self.q_norm, self.k_norm, self.num_heads, packed))


class SwiGLU(nn.Module):
    """``fc2(RMSNorm(silu(fc1 x) * fc3 x))``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)
        self.fc3 = nn.Linear(config.hidden_size, config.mlp_size)
        self.norm = RMSNorm(config.mlp_size, eps=config.norm_eps)

    def forward(self, x_PD: Tensor) -> Tensor:
        """[P, D] to [P, D]."""
        return linear(self.fc2, gate_norm(linear(self.fc1, x_PD), linear(self.fc3, x_PD), self.norm))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each scaled per channel (LayerScale)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
        self.norm2 = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, x_PD: Tensor, packed: PackedGrids) -> Tensor:
        """[P, D] to [P, D]."""
        x_PD = add_scaled(x_PD, self.ls1, self.attn(norm(x_PD, self.norm1), packed))
        return add_scaled(x_PD, self.ls2, self.mlp(norm(x_PD, self.norm2)))


class Blocks(nn.Module):
    """Holds the blocks under their published name, ``encoder.layers``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))


class LongCatViT(nn.Module):
    """Patch embedding and blocks; no class token, no position table, no final norm (published demo code)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Blocks(config)

    def forward(self, patches_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features [P, D] of packed patches [P, C]; see :meth:`VisionEncoder.vit_features`."""
        rows = patches_PC.shape[0]
        missing = -rows % ROW_TILE
        if missing:
            # A spare window of zeros: a row's bits then do not depend on who shares its batch (layers.row_padded).
            patches_PC, grids = F.pad(patches_PC, (0, 0, 0, missing)), [*grids, (1, 1, missing)]
        config = self.config
        packed = pack_grids(grids, config.hidden_size // config.num_heads, config.rope_base, patches_PC.device)
        x_PD = self.embeddings(patches_PC)
        if packed.order_R is not None:
            x_PD = x_PD[packed.order_R]
        for block in self.encoder.layers:
            x_PD = block(x_PD, packed)
        if packed.order_R is not None:
            x_PD = x_PD[torch.argsort(packed.order_R)]
        return x_PD[:rows]


def in_runs(network: Callable[[Tensor, Sequence[Grid]], Tensor], patches_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
    """``network`` over packed items, in runs that stay in the cache where that is faster; the bits are the same."""
    lengths = [math.prod(grid) for grid in grids]
    # A graph keeps every activation anyway, and an accelerator wants the whole batch at once.
    runs = [] if torch.is_grad_enabled() or patches_PC.device.type != "cpu" else item_runs(lengths, RUN_ROWS)
    if len(runs) < 2:
        return network(patches_PC, grids)
    pieces = patches_PC.split([sum(lengths[run]) for run in runs])
    return torch.cat([network(piece, grids[run]) for piece, run in zip(pieces, runs, strict=True)])


class VisionEncoder(Pretrained):
    """ViT (``vit``) and projector (``projector``): packed patches in, rows of the language model's width out."""

    MODEL_TYPE = MODEL_TYPE
    CONFIG = VisionConfig
    KIND = "a vision encoder"

    def __init__(self, config: VisionConfig, *, seed: int = 0) -> None:
        """Build with parameters that depend on ``config`` and ``seed`` alone; the global random state is untouched."""
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.vit = LongCatViT(config)
            self.projector = VisionProjector(config)

    def vit_features(self, patches_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """ViT features before the projector, [patches, D]; arguments as in :meth:`forward`."""
        self._check(patches_PC, grids)
        return in_runs(self.vit, patches_PC, grids)

    def forward(self, patches_PC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode packed items, each frame pair on its own; sizes may differ, and nothing is padded to a common size.

        On CPU in fp32 an item's rows have the same bits whoever shares its batch.

        Args:
            patches_PC: [patches, 3 * temporal patch * p * p], normalised pixels, channel-major (channel, time, row,
                column) inside a patch; items concatenated, raster order inside a frame pair.
            grids: (frame pairs, patch rows, patch columns) of every item; empty is a normal batch.
        Returns:
            [tokens, output_size], items in order; an item gives :func:`merged_tokens` rows.
        Raises:
            MediaError: patches and grids disagree, or a grid cannot be joined by the merge.
        """
        self._check(patches_PC, grids)
        return in_runs(lambda piece, some: self.projector(self.vit(piece, some), some), patches_PC, grids)

    def tokens(self, grid: Grid) -> int:
        """Rows that :meth:`forward` gives for one item."""
        return merged_tokens(grid, self.config.merge)

    def _check(self, patches_PC: Tensor, grids: Sequence[Grid]) -> None:
        for i, grid in enumerate(grids):
            if min(grid) < 1:
                raise MediaError(f"item {i} has a grid of {grid[0]} x {grid[1]} x {grid[2]} patches; leave it out")
        want = (sum(math.prod(grid) for grid in grids), self.config.patch_values)
        if tuple(patches_PC.shape) != want:
            raise MediaError(
                f"patches have shape {list(patches_PC.shape)}, yet {len(grids)} grids of patch size "
                f"{self.config.patch_size} need {list(want)}; patchify with the encoder's own settings"
            )
        # One pass over the input finds what would otherwise come out as silent nonsense; a sum that only overflows is
        # followed by the test of every value.
        if not bool(patches_PC.detach().sum().isfinite()):
            bad_P = (~patches_PC.isfinite().all(dim=1)).nonzero()
            if len(bad_P):
                ends = torch.tensor([math.prod(grid) for grid in grids]).cumsum(0)
                item = int((ends <= bad_P[0].cpu()).sum())
                raise MediaError(
                    f"item {item} has pixels that are not finite ({len(bad_P)} of {len(patches_PC)} patches in all); "
                    "decode it again"
                )
