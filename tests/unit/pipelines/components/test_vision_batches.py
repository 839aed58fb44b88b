"""Training batches of painted digits: what may be drawn, where it moves, how it is cut into patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omni_ray.config.model import model_preset
from omni_ray.data.image import patchify as data_patchify
from omni_ray.data.tiny_world.pictures import Glyphs, draw_picture, load_glyphs
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, is_held_out
from pipelines.components.vision_batches import KEPT_AWAY, BatchPainter, _any_inks, patchify


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return load_glyphs(None)


def brightest(frames_BT3SS: torch.Tensor) -> NDArray[np.float32]:
    """Ink colour of each picture: mean of its 50 brightest pixels, [B, 3]."""
    pixels = frames_BT3SS[:, 0].flatten(2)
    where = pixels.sum(dim=1).topk(50).indices
    return pixels.gather(2, where[:, None].expand(-1, 3, -1)).mean(dim=2).numpy()


def test_held_out_combinations_are_never_drawn(glyphs: Glyphs) -> None:
    painter = BatchPainter(glyphs.train, seed=0)
    seen = set()
    for _ in range(20):
        for batch in (painter.pictures(64), painter.frame_pairs(64)):
            seen |= set(zip(batch.colours, batch.digits, strict=True))
    assert not any(is_held_out(colour, digit) for colour, digit in seen)
    assert len(seen) == 48


def test_pictures_wear_their_colour(glyphs: Glyphs) -> None:
    batch = BatchPainter(glyphs.train, seed=1).pictures(64)
    world = np.array(list(COLOURS.values()), dtype=np.float32)
    nearest = np.linalg.norm(brightest(batch.frames_BT3SS)[:, None] - world, axis=-1).argmin(axis=1)
    assert [list(COLOURS)[i] for i in nearest] == list(batch.colours)


def test_any_inks_keep_away_from_held_out_colours() -> None:
    digits = tuple(range(len(DIGITS))) * 200
    inks = _any_inks(np.random.default_rng(0), digits)
    close = 0
    for digit, ink in zip(digits, inks, strict=True):
        for colour, rgb in COLOURS.items():
            distance = float(np.linalg.norm(ink - np.array(rgb)))
            assert not (is_held_out(colour, digit) and distance < KEPT_AWAY)
            close += distance < KEPT_AWAY
    assert close > 20, "inks near the other colours must stay, or the check above proves nothing"


def test_any_ink_has_no_colour_captions(glyphs: Glyphs) -> None:
    batch = BatchPainter(glyphs.train, seed=1).pictures(4, any_ink=True)
    assert batch.captions("digit") == [DIGITS[d] for d in batch.digits]
    with pytest.raises(ValueError, match="zip"):
        batch.captions("colour digit")


def test_frame_pairs_move_the_way_their_caption_says(glyphs: Glyphs) -> None:
    batch = BatchPainter(glyphs.train, seed=2).frame_pairs(48)
    ink = (batch.frames_BT3SS.amax(dim=2) - 45).clamp(min=0)
    line = torch.arange(56, dtype=torch.float32)
    weight = ink.sum(dim=(-2, -1))
    x, y = (ink.sum(dim=-2) * line).sum(-1) / weight, (ink.sum(dim=-1) * line).sum(-1) / weight
    moved = torch.stack([x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]], dim=1)
    for (dx, dy), word in zip(moved.tolist(), batch.directions, strict=True):
        step_x, step_y = DIRECTIONS[word]
        assert 2.5 < dx * step_x + dy * step_y < 5.0
        assert abs(dx * step_y) + abs(dy * step_x) < 0.5


def test_drawn_batches_look_like_drawn_pictures(glyphs: Glyphs) -> None:
    """Ink area and place of whole batches against draw_picture's, within sampling error."""
    batch = BatchPainter(glyphs.train, seed=3).pictures(256).frames_BT3SS[:, 0].amax(dim=1).numpy()
    rng = np.random.default_rng(0)
    colours = list(COLOURS)
    single = np.stack(
        [
            draw_picture(rng, glyphs.train.images[rng.integers(len(glyphs.train))], colours[rng.integers(6)]).max(
                axis=2
            )
            for _ in range(256)
        ]
    )
    for measure in (lambda x: (x > 100).mean(), lambda x: x.mean(), lambda x: x.mean(axis=0).std()):
        assert measure(batch) == pytest.approx(measure(single), rel=0.12)


def test_scenes_stand_side_by_side(glyphs: Glyphs) -> None:
    scenes, single = BatchPainter(glyphs.train, seed=4).scenes(2, 3), BatchPainter(glyphs.train, seed=4).pictures(6)
    assert scenes.frames_BT3SS.shape == (2, 1, 3, 56, 168)
    assert torch.equal(scenes.frames_BT3SS[1, :, :, :, 56:112], single.frames_BT3SS[4])
    assert (scenes.digits, scenes.colours, scenes.per_picture) == (single.digits, single.colours, 3)


def test_batches_follow_the_seed(glyphs: Glyphs) -> None:
    first, again, other = (BatchPainter(glyphs.train, seed=s, warp=0.5).pictures(4).frames_BT3SS for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_patches_equal_those_of_the_data_side() -> None:
    config = model_preset("tiny").vision
    frames = np.random.default_rng(0).integers(256, size=(2, 2, 28, 56, 3), dtype=np.uint8)
    tensor_BT3SS = torch.from_numpy(frames).float().permute(0, 1, 4, 2, 3)
    patches, grids = patchify(tensor_BT3SS, config)
    still, _ = patchify(tensor_BT3SS[:, :1], config)
    pairs = [data_patchify(clip, config) for clip in frames]
    stills = [data_patchify(np.stack([clip[0]] * 2), config) for clip in frames]
    assert grids == [item.grid for item in pairs]
    for rows, items in ((patches, pairs), (still, stills)):
        expected = torch.from_numpy(np.concatenate([item.values_PC for item in items]))
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
