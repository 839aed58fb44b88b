"""Handwritten digits painted."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from omni_ray.data.tiny_world.pictures import Glyphs, draw_picture, draw_scene, draw_video, load_glyphs
from omni_ray.data.tiny_world.words import COLOURS, DIRECTIONS
from omni_ray.types.errors import DataError


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return load_glyphs(None)


def test_splits_share_no_picture(glyphs: Glyphs) -> None:
    assert (len(glyphs.train), len(glyphs.held_out_sklearn), len(glyphs.held_out_mnist)) == (1400, 397, 0)
    assert not set(glyphs.train.ids) & set(glyphs.held_out_sklearn.ids)
    assert glyphs.train.images.shape == (1400, 28, 28)
    assert set(glyphs.train.labels.tolist()) == set(range(10))


def test_mnist_folder_is_split_into_blocks(tmp_path: Path) -> None:
    folder = tmp_path / "handwritten-digits"
    folder.mkdir()
    images = np.zeros((3700, 28, 28), dtype=np.uint8)
    images[:, 8:20, 12:16] = 200
    _write_idx(folder / "images-idx3-ubyte.gz", images)
    _write_idx(folder / "labels-idx1-ubyte.gz", np.full(3700, 1, dtype=np.uint8))
    found = load_glyphs(tmp_path)
    assert (len(found.train), len(found.held_out_mnist)) == (1400 + 3600, 100)
    assert found.held_out_mnist.ids[0] == "mnist-3600"
    assert found.held_out_mnist.images[0, :, 14].min() > 0, "the ink fills the height"


def test_a_damaged_mnist_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "handwritten-digits"
    folder.mkdir()
    (folder / "images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + bytes(12) + b"x"))
    with pytest.raises(DataError, match=r"images-idx3-ubyte.gz promises \(0, 0, 0\) values and holds 1"):
        load_glyphs(tmp_path)
    (folder / "images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read as gzip"):
        load_glyphs(tmp_path)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_picture_has_its_colour_on_a_dark_ground(glyphs: Glyphs, colour: str) -> None:
    pixels = draw_picture(np.random.default_rng(1), glyphs.train.images[0], colour)
    assert (pixels.shape, pixels.dtype) == ((56, 56, 3), np.uint8)
    brightest = pixels.reshape(-1, 3)[pixels.sum(axis=2).argmax()].astype(float)
    distances = {name: np.abs(np.asarray(rgb) * 0.93 - brightest).sum() for name, rgb in COLOURS.items()}
    assert min(distances, key=distances.__getitem__) == colour
    assert np.median(pixels) < 60


def test_equal_seeds_give_equal_pictures(glyphs: Glyphs) -> None:
    first, again, other = (draw_picture(np.random.default_rng(s), glyphs.train.images[3], "blue") for s in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_video_moves_evenly_its_way(glyphs: Glyphs, direction: str) -> None:
    frames = draw_video(np.random.default_rng(2), glyphs.train.images[5], "green", direction)
    assert frames.shape == (8, 56, 56, 3)
    places = np.stack([_centre(frame) for frame in frames])
    steps, way = np.diff(places, axis=0), np.asarray(DIRECTIONS[direction])
    along, across = steps @ way, steps @ way[::-1]
    assert along.min() > 2.0, "motion shows between the two frames of a pair"
    assert np.abs(across).max() < 0.5


def test_a_scene_stands_side_by_side(glyphs: Glyphs) -> None:
    images = [glyphs.train.images[i] for i in range(3)]
    scene = draw_scene(np.random.default_rng(0), images, ["red", "green", "blue"])
    assert scene.shape == (56, 168, 3)
    assert [int(scene[:, 56 * i : 56 * (i + 1)].reshape(-1, 3).sum(axis=0).argmax()) for i in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="as many colours as digits"):
        draw_scene(np.random.default_rng(0), images, ["red"])


def _centre(frame: np.ndarray) -> np.ndarray:
    """(x, y) of the bright part."""
    ink = np.clip(frame.max(axis=2).astype(float) - 60, 0, None)
    rows, columns = np.mgrid[:56, :56]
    return np.array([(ink * columns).sum(), (ink * rows).sum()]) / ink.sum()


def _write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes(), compresslevel=1))
