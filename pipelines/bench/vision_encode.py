"""Vision encoder: packed pictures over pictures padded to the largest of their group, same network and weights.

The padded side is what one writes in plain torch, as in ``audio-encode``; ``padded_over_real_rows`` says how much of
the gain is the padding, the rest is how the rows are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.model import SizeName, model_preset
from omni_ray.models.projector import Grid
from omni_ray.models.vision_encoder import Block, VisionEncoder, rope_angles
from omni_ray.models.vision_passes import rotate
from omni_ray.types.errors import OmniError
from pipelines.bench.writer import BenchReport, alternate, environment, measured

ITEMS, GROUP = 32, 8
LEAST, MOST = 64, 1024
"""Patches of a picture, log-uniform between."""
SIZES: tuple[SizeName, ...] = ("small", "tiny")
"""The named figure is of ``small``, whose limits are 64 to 1,024 patches; ``tiny`` is reported beside it."""

# B pictures of a group, L patches of the longest, D hidden size, C values of a patch


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Both sides on the same pictures, alternating, one thread.

    Args:
        quick: 3 runs in place of 7 (the same pictures and sizes).  seed: Draws other pictures and weights.
    """
    repeats = 3 if quick else 7
    figures = []
    torch.set_num_threads(1)
    grids = draw_grids(seed)
    counts = [h * w for _, h, w in grids]
    padded = sum(GROUP * max(group) for group in _groups(sorted(counts)))
    for size in SIZES:
        encoder = VisionEncoder(model_preset(size).vision, seed=seed).eval()
        generator = torch.Generator().manual_seed(seed + 1)
        items = [torch.randn(n, encoder.config.patch_values, generator=generator) for n in counts]
        patches = torch.cat(items)

        def packed(encoder: VisionEncoder = encoder, patches: Tensor = patches) -> object:
            return encoder(patches, grids)

        def groups(encoder: VisionEncoder = encoder, items: list[Tensor] = items) -> object:
            return padded_encode(encoder, items, grids)

        with torch.no_grad():
            check_equal(encoder(patches, grids), groups(), encoder, grids)
            seconds = alternate({"packed": timed(packed), "padded": timed(groups)}, repeats)
        ratios = [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)]
        name = "packed_speedup" if size == SIZES[0] else f"packed_speedup_{size}"
        what = f"{size}, {ITEMS} pictures of {min(counts)} to {max(counts)} patches; padded in sorted groups of {GROUP}"
        goal = 1.5 if size == SIZES[0] else None
        figures.append(measured(name, ratios, unit="ratio", better="higher", goal=goal, against=what))
        rate = [sum(counts) / s for s in seconds["packed"]]
        figures.append(
            measured(f"packed_rate_{size}", rate, unit="patches/s", better="higher", against="packed side, one core")
        )
    figures.append(
        measured("padded_over_real_rows", [padded / sum(counts)], unit="ratio", better="lower", against="waste of rows")
    )
    return BenchReport(bench="vision-encode", figures=tuple(figures), environment=environment(seed=seed, quick=quick))


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return once


def draw_grids(seed: int) -> list[Grid]:
    """Pictures with log-uniform patch counts and sides of at most 2:1, even as the merge wants them."""
    generator = torch.Generator().manual_seed(seed)
    grids: list[Grid] = []
    while len(grids) < ITEMS:
        count, shape = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        wanted, aspect = LEAST * (MOST / LEAST) ** count, 2 ** (2 * shape - 1)
        height, width = (2 * max(1, round((wanted * a) ** 0.5 / 2)) for a in (aspect, 1 / aspect))
        if LEAST <= height * width <= MOST:
            grids.append((1, height, width))
    return grids


def padded_encode(encoder: VisionEncoder, items: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """The same network over rectangles: pictures sorted by size, groups of eight, padded to the longest, masked.

    Returns:
        Language rows of every picture, in the order given.
    """
    out: list[Tensor] = [torch.empty(0)] * len(items)
    config = encoder.config
    for members in _groups(sorted(range(len(items)), key=lambda i: len(items[i]))):
        longest = max(len(items[i]) for i in members)
        x_BLC = torch.stack([F.pad(items[i], (0, 0, 0, longest - len(items[i]))) for i in members])
        head = config.hidden_size // config.num_heads
        angles = [rope_angles(grids[i][1], grids[i][2], head, config.rope_base) for i in members]
        angles_BL1e = torch.stack([F.pad(a, (0, 0, 0, longest - len(a))) for a in angles]).unsqueeze(2)
        real_BL = torch.arange(longest) < torch.tensor([len(items[i]) for i in members]).unsqueeze(1)
        hidden_BLD = padded_features(encoder, x_BLC, angles_BL1e, real_BL)
        joined_BTJ = hidden_BLD.reshape(len(members), longest // config.merge[1], -1)
        rows_BTH = encoder.projector.proj(encoder.projector.p0(joined_BTJ))
        for b, i in enumerate(members):
            out[i] = rows_BTH[b, : encoder.tokens(grids[i])]
    return out


def padded_features(encoder: VisionEncoder, x_BLC: Tensor, angles_BL1e: Tensor, real_BL: Tensor) -> Tensor:
    """ViT over a padded rectangle [B, L, C]; padded keys are masked out of every softmax.  Returns [B, L, D]."""
    config = encoder.config
    batch, length = real_BL.shape
    cos, sin = angles_BL1e.cos(), angles_BL1e.sin()
    mask = None if bool(real_BL.all()) else real_BL[:, None, None, :]
    x_BLD = encoder.vit.embeddings(x_BLC)
    for block in encoder.vit.encoder.layers:
        assert isinstance(block, Block)
        query, key, value = block.attn.qkv(block.norm1(x_BLD)).chunk(3, dim=-1)
        split = (batch, length, config.num_heads, -1)
        query, key = (rotate(x.reshape(split), cos, sin).flatten(2) for x in (query, key))
        query, key = block.attn.q_norm(query), block.attn.k_norm(key)
        q, k, v = (x.reshape(split).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x_BLD = x_BLD + block.ls1 * block.attn.proj(mixed)
        mlp, normed_BLD = block.mlp, block.norm2(x_BLD)
        x_BLD = x_BLD + block.ls2 * mlp.fc2(mlp.norm(F.silu(mlp.fc1(normed_BLD)) * mlp.fc3(normed_BLD)))
    return x_BLD


def check_equal(packed: Tensor, padded: object, encoder: VisionEncoder, grids: Sequence[Grid]) -> None:
    """Refuse to time two sides that do not compute the same.

    Raises:
        OmniError: a real row differs by more than rounding.
    """
    assert isinstance(padded, list)
    pieces = packed.split([encoder.tokens(grid) for grid in grids])
    for i, (one, other) in enumerate(zip(pieces, padded, strict=True)):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
            worst = float((one - other).abs().max())
            raise OmniError(f"picture {i}: packed and padded rows differ by {worst:g}; one of the two sides is wrong")


def _groups(ordered: Sequence[int]) -> list[Sequence[int]]:
    return [ordered[start : start + GROUP] for start in range(0, len(ordered), GROUP)]
