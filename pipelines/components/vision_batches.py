"""Training batches of painted digits, drawn whole batches at a time; same look as data/tiny_world/pictures.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from omni_ray.config.model import VisionConfig
from omni_ray.data.image import MEAN, STD
from omni_ray.data.tiny_world.pictures import GlyphSet
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, is_held_out, pairs
from omni_ray.models.projector import Grid

SIDE = 56
GLYPH_SIDE = 28
PICTURE_BOX = (0.75, 0.98)
MOVING_BOX = (0.46, 0.58)
PAIRS_PER_CLIP = 7
"""Steps between the frames of an 8-frame clip."""
KEPT_AWAY = 60.0
"""RGB distance within which an ink could be taken for a held-out colour (world inks vary by at most about 50)."""

# B pictures, T frames (1 for a still picture, 2 for a frame pair), S side in pixels; W width, a multiple of S


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureBatch:
    """Painted pictures or frame pairs, and what is on them."""

    frames_BT3SS: Tensor
    """Pixels 0..255, whole numbers, fp32; wider than high where a picture holds several digits."""
    colours: tuple[str, ...]
    """Colour word of each; empty where the inks are of any hue."""
    digits: tuple[int, ...]
    """Digit of each."""
    directions: tuple[str, ...]
    """Direction word of each; empty for still pictures."""
    per_picture: int = 1
    """Digits side by side in one picture; colours and digits are listed picture by picture, left to right."""

    def captions(self, kind: str) -> list[str]:
        """Captions of one kind: the words ``colour``, ``digit``, ``direction`` in any combination."""
        parts = {"colour": self.colours, "digit": [DIGITS[d] for d in self.digits], "direction": self.directions}
        return [" ".join(words) for words in zip(*(parts[word] for word in kind.split()), strict=True)]


class BatchPainter:
    """Draws random training batches from one split's glyphs; only colour-digit pairs of the training split."""

    def __init__(self, glyphs: GlyphSet, seed: int, *, warp: float = 0.0) -> None:
        """Start the stream of batches of ``seed``.

        Args:
            warp: Standard deviation, in glyph pixels, of a smooth bend of still pictures (0 for none).
        """
        self._rng = np.random.default_rng([seed, 7])
        self._images = torch.from_numpy(np.ascontiguousarray(glyphs.images))
        self._pairs = pairs(held_out=False)
        self._warp = warp
        sources = np.array([name.split("-")[0] for name in glyphs.ids])
        self._pools = [
            [np.flatnonzero((glyphs.labels == digit) & (sources == source)) for source in sorted(set(sources))]
            for digit in range(len(DIGITS))
        ]

    def pictures(self, count: int, box: tuple[float, float] = PICTURE_BOX, *, any_ink: bool = False) -> PictureBatch:
        """Still pictures of one digit each; with ``any_ink`` in inks of every hue, and no colour words."""
        glyphs, colours, digits = self._choose(count)
        size = SIDE * self._rng.uniform(*box, size=count)
        centre = SIDE / 2 + self._rng.uniform(-1, 1, size=(count, 1, 2)) * ((SIDE - size) / 2)[:, None, None]
        ink = _any_inks(self._rng, digits) if any_ink else _world_inks(self._rng, colours)
        frames = self._paint(glyphs, ink, size, centre, warp=self._warp)
        return PictureBatch(frames_BT3SS=frames, colours=() if any_ink else colours, digits=digits, directions=())

    def scenes(self, count: int, per_picture: int, *, any_ink: bool = False) -> PictureBatch:
        """``count`` wide pictures of several digits side by side, each on its own square."""
        single = self.pictures(count * per_picture, any_ink=any_ink)
        squares = single.frames_BT3SS.view(count, per_picture, 1, 3, SIDE, SIDE)
        wide = squares.permute(0, 2, 3, 4, 1, 5).reshape(count, 1, 3, SIDE, per_picture * SIDE)
        return replace(single, frames_BT3SS=wide, per_picture=per_picture)

    def frame_pairs(self, count: int, box: tuple[float, float] = MOVING_BOX, *, any_ink: bool = False) -> PictureBatch:
        """Two neighbouring frames of an eight-frame clip in which the digit crosses the picture."""
        rng = self._rng
        glyphs, colours, digits = self._choose(count)
        words = tuple(DIRECTIONS)
        directions = tuple(words[i] for i in rng.integers(len(words), size=count))
        step = np.array([DIRECTIONS[word] for word in directions], dtype=np.float64)
        size = SIDE * rng.uniform(*box, size=count)
        room = ((SIDE - size) / 2)[:, None]
        first = rng.integers(PAIRS_PER_CLIP, size=(count, 1))
        along = room * (2 * (first + np.array([[0, 1]])) / PAIRS_PER_CLIP - 1)
        across = room * rng.uniform(-1, 1, size=(count, 1))
        centre = SIDE / 2 + along[..., None] * step[:, None] + across[..., None] * step[:, None, ::-1]
        ink = _any_inks(rng, digits) if any_ink else _world_inks(rng, colours)
        frames = self._paint(glyphs, ink, size, centre, warp=0.0)
        shown = () if any_ink else colours
        return PictureBatch(frames_BT3SS=frames, colours=shown, digits=digits, directions=directions)

    def _choose(self, count: int) -> tuple[Tensor, tuple[str, ...], tuple[int, ...]]:
        """Glyphs [B, 28, 28] with colours and digits: pairs evenly, then sources evenly, then pictures evenly."""
        rng = self._rng
        chosen = [self._pairs[i] for i in rng.integers(len(self._pairs), size=count)]
        rows = [int(rng.choice(self._pools[digit][rng.integers(len(self._pools[digit]))])) for _, digit in chosen]
        return self._images[rows], tuple(c for c, _ in chosen), tuple(d for _, d in chosen)

    def _paint(
        self,
        glyphs_BGG: Tensor,
        ink_B3: NDArray[np.float64],
        size_B: NDArray[np.float64],
        centre_BT2: NDArray[np.float64],
        warp: float,
    ) -> Tensor:
        """Bent, turned and coloured digits on dark grounds, [B, T, 3, S, S]."""
        rng, count, frames = self._rng, len(size_B), centre_BT2.shape[1]
        inverse_B22 = np.linalg.inv(_shape_matrices(rng, count) * (size_B / GLYPH_SIDE)[:, None, None])
        offset_BT2 = GLYPH_SIDE / 2 - np.einsum("bij,btj->bti", inverse_B22, centre_BT2)
        pixels_Q2 = _pixel_centres()
        turned_BQ2 = pixels_Q2 @ torch.from_numpy(inverse_B22).float().transpose(1, 2)
        points = turned_BQ2[:, None] + torch.from_numpy(offset_BT2).float()[:, :, None]
        if warp:
            points = points + warp * _bends(rng, count)[:, None]
        where = (points * (2 / GLYPH_SIDE) - 1).view(count, frames * SIDE, SIDE, 2)
        ink = F.grid_sample(glyphs_BGG[:, None].float() / 255, where, align_corners=False)
        share = (ink * 1.25).clamp(max=1.0).view(count, frames, 1, SIDE, SIDE)
        ground, paint = (torch.from_numpy(x).float()[:, None, :, None, None] for x in (_grounds(rng, count), ink_B3))
        return (ground + share * (paint - ground)).clamp(0, 255).round()


def _shape_matrices(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Rotation up to 12 degrees, shear up to 0.2, stretch up to 10 %: [B, 2, 2]."""
    angle, shear = np.deg2rad(rng.uniform(-12, 12, size=count)), rng.uniform(-0.2, 0.2, size=count)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=-1).reshape(count, 2, 2)
    slant = np.tile(np.eye(2), (count, 1, 1))
    slant[:, 0, 1] = shear
    return np.asarray(turn @ slant * rng.uniform(0.9, 1.0, size=(count, 1, 2)))


def _grounds(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Dark grounds, [B, 3]."""
    return np.asarray(rng.uniform(5, 35, size=(count, 1)) + rng.uniform(-5, 5, size=(count, 3)))


def _world_inks(rng: np.random.Generator, colours: tuple[str, ...]) -> NDArray[np.float64]:
    """Inks of the colour words, varied a little, [B, 3]."""
    count = len(colours)
    pure = np.array([COLOURS[colour] for colour in colours], dtype=np.float64)
    return np.asarray(pure * rng.uniform(0.85, 1.0, size=(count, 1)) + rng.uniform(-10, 10, size=(count, 3)))


def _any_inks(rng: np.random.Generator, digits: tuple[int, ...]) -> NDArray[np.float64]:
    """Bright inks of every hue, [B, 3], away from the colours that are held out for the digit.

    Were a digit seen in its six-word colours alone, the colours that never go with it would speak against it, and it
    would be missed in every held-out combination.
    """
    kept_away = np.array([[is_held_out(colour, digit) for colour in COLOURS] for digit in range(len(DIGITS))])
    world = np.array(list(COLOURS.values()), dtype=np.float64)
    inks = np.zeros((len(digits), 3))
    todo = np.arange(len(digits))
    while todo.size:
        drawn = rng.uniform(0, 1, size=(todo.size, 3))
        inks[todo] = drawn / drawn.max(axis=1, keepdims=True) * rng.uniform(170, 255, size=(todo.size, 1))
        near = np.linalg.norm(inks[todo, None] - world, axis=-1) < KEPT_AWAY
        todo = todo[(near & kept_away[np.array(digits)[todo]]).any(axis=1)]
    return inks


def _pixel_centres() -> Tensor:
    """(x, y) of every pixel's middle, [S * S, 2]."""
    line = torch.arange(SIDE, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def _bends(rng: np.random.Generator, count: int) -> Tensor:
    """A smooth random displacement of every pixel, [B, S * S, 2], unit deviation at its 5 x 5 knots."""
    knots = torch.from_numpy(rng.standard_normal((count, 2, 5, 5))).float()
    smooth = F.interpolate(knots, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    return smooth.view(count, 2, SIDE * SIDE).transpose(1, 2)


def patchify(frames_BTSS: Tensor, config: VisionConfig) -> tuple[Tensor, list[Grid]]:
    """Normalised rows of equal pictures for the encoder: ``data.image.patchify`` for a whole batch.

    Args:
        frames_BTSS: [B, T, 3, S, S] pixels 0..255; one frame is repeated to a pair.
    Returns:
        Patches [B * (S/p)^2, 3 * 2 * p * p] in (channel, time, row, column) order, and one grid a picture.
    """
    count, frames, _, height, width = frames_BTSS.shape
    patch, pair = config.patch_size, config.temporal_patch_size
    mean, std = (torch.from_numpy(x).view(3, 1, 1) * 255 for x in (MEAN, STD))
    pixels = (frames_BTSS - mean) / std
    if frames == 1:
        pixels = pixels.expand(-1, pair, -1, -1, -1)
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(count, pair, 3, rows, patch, columns, patch).permute(0, 3, 5, 2, 1, 4, 6)
    return blocks.reshape(count * rows * columns, config.patch_values), [(1, rows, columns)] * count
