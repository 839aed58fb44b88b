"""Handwritten digits, painted: coloured pictures, scenes of several digits, and clips of one moving digit."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni_ray.data.tiny_world.words import COLOURS, DIRECTIONS
from omni_ray.types.errors import DataError

SKLEARN_HELD_OUT = 397
"""Last scikit-learn pictures that training never sees."""
MNIST_TRAIN = 3600
"""First MNIST pictures for training; writers come in contiguous blocks, so the rest has other writers."""
GLYPH_SIDE = 28
_SKLEARN_ENLARGE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GlyphSet:
    """Grey handwritten digits of one split."""

    images: NDArray[np.uint8]
    """[N, 28, 28], ink bright, cut to the ink and scaled so that its longer side fills the picture."""
    labels: NDArray[np.int64]
    """[N], the digit."""
    ids: tuple[str, ...]
    """Where each picture comes from, for instance ``sklearn-0017`` or ``mnist-0123``."""

    def __len__(self) -> int:
        return len(self.ids)

    def of_digit(self, digit: int) -> NDArray[np.int64]:
        """Positions of one digit's pictures, ascending."""
        return np.flatnonzero(self.labels == digit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """All handwritten digits at hand, split by writer."""

    train: GlyphSet
    """scikit-learn's first 1,400, and MNIST's first 3,600 where the real-data folder has them."""
    held_out_sklearn: GlyphSet
    """scikit-learn's last 397."""
    held_out_mnist: GlyphSet
    """MNIST's last 1,400; empty without the real-data folder."""


def load_glyphs(real_data: Path | None) -> Glyphs:
    """Read the digits of scikit-learn and, where a real-data folder has ``handwritten-digits``, of MNIST.

    Raises:
        DataError: scikit-learn is missing, or the folder's files are not what they should be.
    """
    sklearn = _load_sklearn()
    cut = len(sklearn) - SKLEARN_HELD_OUT
    train, held_out_mnist = _take(sklearn, 0, cut), _take(sklearn, 0, 0)
    folder = None if real_data is None else Path(real_data) / "handwritten-digits"
    if folder is not None and folder.is_dir():
        mnist = _load_mnist(folder)
        train, held_out_mnist = _join(train, _take(mnist, 0, MNIST_TRAIN)), _take(mnist, MNIST_TRAIN, len(mnist))
    return Glyphs(train=train, held_out_sklearn=_take(sklearn, cut, len(sklearn)), held_out_mnist=held_out_mnist)


def draw_picture(
    rng: np.random.Generator,
    glyph: NDArray[np.uint8],
    colour: str,
    side: int = 56,
    *,
    box: tuple[float, float] = (0.75, 0.98),
    augment: bool = True,
) -> NDArray[np.uint8]:
    """Paint one digit in a colour on a dark ground.

    Args:
        glyph: [28, 28] grey digit.  box: Smallest and largest size of the digit, as a share of the side.
        augment: Rotate, shear and stretch it a little besides.
    Returns:
        [side, side, 3] uint8; the digit lies at a random place that keeps its box inside.
    """
    size = side * rng.uniform(*box)
    matrix = _shape_matrix(rng, augment)
    room = (side - size) / 2
    centre = side / 2 + rng.uniform(-room, room, size=2)
    ground, ink = _paints(rng, colour)
    return _paint(_place(glyph, matrix, size, centre, (side, side)), ground, ink)


def draw_scene(
    rng: np.random.Generator,
    glyphs: list[NDArray[np.uint8]],
    colours: list[str],
    side: int = 56,
    *,
    augment: bool = True,
) -> NDArray[np.uint8]:
    """Paint several digits side by side, left to right: [side, side * n, 3] uint8."""
    if not glyphs or len(glyphs) != len(colours):
        raise ValueError(f"a scene needs as many colours as digits and at least one, not {len(glyphs)}, {len(colours)}")
    return np.concatenate(
        [draw_picture(rng, g, c, side, augment=augment) for g, c in zip(glyphs, colours, strict=True)], axis=1
    )


def draw_video(
    rng: np.random.Generator,
    glyph: NDArray[np.uint8],
    colour: str,
    direction: str,
    frames: int = 8,
    side: int = 56,
    *,
    box: tuple[float, float] = (0.46, 0.58),
    augment: bool = True,
) -> NDArray[np.uint8]:
    """Paint one digit that moves evenly from one edge to the other.

    Returns:
        [frames, side, side, 3] uint8; with 8 frames of 56 pixels the digit moves 3 to 4 pixels a frame, so motion
        shows inside every frame pair as well as across the clip.
    """
    size = side * rng.uniform(*box)
    matrix = _shape_matrix(rng, augment)
    room = (side - size) / 2
    step = np.asarray(DIRECTIONS[direction], dtype=np.float64)
    across = rng.uniform(-room, room) * step[::-1]
    ground, ink = _paints(rng, colour)
    pictures = []
    for along in np.linspace(-room, room, frames):
        centre = side / 2 + along * step + across
        pictures.append(_paint(_place(glyph, matrix, size, centre, (side, side)), ground, ink))
    return np.stack(pictures)


def _shape_matrix(rng: np.random.Generator, augment: bool) -> NDArray[np.float64]:
    """Rotation up to 12 degrees, shear up to 0.2, stretch up to 10 %: [2, 2], glyph plane to picture plane."""
    if not augment:
        return np.eye(2)
    angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(rng.uniform(0.9, 1.0, size=2))


def _place(
    glyph: NDArray[np.uint8], matrix: NDArray[np.float64], size: float, centre: NDArray[np.float64], hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Ink of the glyph on an empty canvas [h, w] in 0..1: ``matrix`` about its middle, ``size`` pixels, at (x, y)."""
    # PIL maps output to input: glyph point = inverse(matrix * size / 28) (picture point - centre) + glyph middle.
    inverse = np.linalg.inv(matrix * (size / GLYPH_SIDE))
    offset = GLYPH_SIDE / 2 - inverse @ centre
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = Image.fromarray(glyph).transform(
        (hw[1], hw[0]), Image.Transform.AFFINE, tuple(float(c) for c in coefficients), Image.Resampling.BILINEAR
    )
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _paints(rng: np.random.Generator, colour: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A dark ground and the colour's ink, both varied a little: [3] each."""
    ground = rng.uniform(5, 35) + rng.uniform(-5, 5, size=3)
    ink = np.asarray(COLOURS[colour], dtype=np.float64) * rng.uniform(0.85, 1.0) + rng.uniform(-10, 10, size=3)
    return ground, ink


def _paint(ink_HW: NDArray[np.float32], ground_3: NDArray[np.float64], ink_3: NDArray[np.float64]) -> NDArray[np.uint8]:
    share_HW1 = np.minimum(np.float32(1.0), ink_HW * np.float32(1.25))[..., None]
    painted = ground_3.astype(np.float32) + share_HW1 * (ink_3 - ground_3).astype(np.float32)
    return np.clip(painted + np.float32(0.5), 0, 255).astype(np.uint8)


def _load_sklearn() -> GlyphSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "scikit-learn is not installed, yet the tiny world's digits come from it; "
            "pip install 'omni-ray[tiny-world]'"
        ) from error
    digits = load_digits()
    images = [_enlarge(np.asarray(image, dtype=np.float64)) for image in digits.images]
    ids = tuple(f"sklearn-{i:04d}" for i in range(len(images)))
    return GlyphSet(images=np.stack(images), labels=np.asarray(digits.target, dtype=np.int64), ids=ids)


def _load_mnist(folder: Path) -> GlyphSet:
    images = _read_idx(folder / "images-idx3-ubyte.gz", dims=3)
    labels = _read_idx(folder / "labels-idx1-ubyte.gz", dims=1)
    if len(images) != len(labels):
        raise DataError(f"{folder} has {len(images)} pictures and {len(labels)} labels; the two files do not belong")
    ids = tuple(f"mnist-{i:04d}" for i in range(len(images)))
    glyphs = np.stack([_cut_and_fill(Image.fromarray(image)) for image in images])
    return GlyphSet(images=glyphs, labels=labels.astype(np.int64), ids=ids)


def _read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: two zero bytes, type 8, number of dims, big-endian sizes, values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as gzip: {error}; restore the file or unset the folder") from error
    if raw[:4] != bytes((0, 0, 8, dims)):
        raise DataError(f"{path} is not an IDX file of bytes with {dims} dims (it starts with {raw[:4].hex()})")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} promises {shape} values and holds {values.size}; the file is cut short")
    return values.reshape(shape)


def _enlarge(image_8: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[8, 8] in 0..16 to a filled glyph [28, 28]."""
    grey = Image.fromarray((image_8 * (255 / 16)).astype(np.uint8))
    large = grey.resize((8 * _SKLEARN_ENLARGE, 8 * _SKLEARN_ENLARGE), Image.Resampling.BICUBIC)
    return _cut_and_fill(large)


def _cut_and_fill(image: Image.Image) -> NDArray[np.uint8]:
    """Cut to the ink, scale the longer side to 28, centre."""
    bounds = image.point(lambda value: 255 * (value > 40)).getbbox()
    if bounds is None:
        raise DataError("a handwritten digit without ink; the file it comes from is damaged")
    ink = image.crop(bounds)
    scale = GLYPH_SIDE / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    canvas = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
    canvas.paste(ink.resize(size, Image.Resampling.BICUBIC), ((GLYPH_SIDE - size[0]) // 2, (GLYPH_SIDE - size[1]) // 2))
    return np.asarray(canvas)


def _take(glyphs: GlyphSet, first: int, last: int) -> GlyphSet:
    return GlyphSet(images=glyphs.images[first:last], labels=glyphs.labels[first:last], ids=glyphs.ids[first:last])


def _join(a: GlyphSet, b: GlyphSet) -> GlyphSet:
    return GlyphSet(
        images=np.concatenate([a.images, b.images]), labels=np.concatenate([a.labels, b.labels]), ids=a.ids + b.ids
    )
