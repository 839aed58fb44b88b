"""What the pretrained vision encoder sees: nearest-caption accuracy on held-out handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omni_ray.data.tiny_world.pictures import Glyphs, GlyphSet, draw_picture, draw_scene, draw_video
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, DIRECTIONS, is_held_out
from omni_ray.training.contrastive import ContrastiveModel
from pipelines.components.vision_batches import MOVING_BOX, PICTURE_BOX, patchify


@torch.no_grad()
def evaluate_vision(
    model: ContrastiveModel, glyphs: Glyphs, *, seed: int = 0, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Nearest-caption accuracy on held-out pictures, one per held-out digit; value, n and chance of each figure.

    Args:
        limit: Use only the first so many pictures of each split.
    """
    model.eval()
    figures: dict[str, dict[str, float]] = {}
    for name, glyph_set in (("sklearn", glyphs.held_out_sklearn), ("mnist", glyphs.held_out_mnist)):
        count = min(len(glyph_set), limit or len(glyph_set))
        if not count:
            continue
        rng = np.random.default_rng([seed, 11, count])
        figures |= {f"{key}_{name}": value for key, value in _still_figures(model, glyph_set, count, rng).items()}
        figures |= {f"{key}_{name}": value for key, value in _pair_figures(model, glyph_set, count, rng).items()}
        figures[f"digit_scene_{name}"] = _scene_figure(model, glyph_set, count, rng)
    return figures


def _still_figures(
    model: ContrastiveModel, glyph_set: GlyphSet, count: int, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    colours = [list(COLOURS)[i] for i in rng.integers(len(COLOURS), size=count)]
    labels = [int(label) for label in glyph_set.labels[:count]]
    figures = {}
    for suffix, box in (("", PICTURE_BOX), ("_small", MOVING_BOX)):
        drawn = [draw_picture(rng, glyph_set.images[i], colours[i], box=box) for i in range(count)]
        pooled = embed(model, np.stack(drawn)[:, None])
        right = nearest(model, pooled, DIGITS) == torch.tensor(labels)
        figures[f"digit{suffix}"] = _figure(right, 0.1)
        unseen = torch.tensor([is_held_out(c, d) for c, d in zip(colours, labels, strict=True)])
        figures[f"digit{suffix}_unseen_combination"] = _figure(right[unseen], 0.1)
        own = torch.tensor([list(COLOURS).index(colour) for colour in colours])
        figures[f"colour{suffix}"] = _figure(nearest(model, pooled, tuple(COLOURS)) == own, 1 / len(COLOURS))
    return figures


def _pair_figures(
    model: ContrastiveModel, glyph_set: GlyphSet, count: int, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    words = tuple(DIRECTIONS)
    own = rng.integers(len(words), size=count)
    drawn = []
    for i in range(count):
        clip = draw_video(rng, glyph_set.images[i], list(COLOURS)[rng.integers(len(COLOURS))], words[own[i]])
        first = rng.integers(len(clip) - 1)
        drawn.append(clip[first : first + 2])
    pooled = embed(model, np.stack(drawn))
    labels = torch.from_numpy(glyph_set.labels[:count])
    return {
        "direction": _figure(nearest(model, pooled, words) == torch.from_numpy(own), 1 / len(words)),
        "digit_moving": _figure(nearest(model, pooled, DIGITS) == labels, 0.1),
    }


def _scene_figure(
    model: ContrastiveModel, glyph_set: GlyphSet, count: int, rng: np.random.Generator
) -> dict[str, float]:
    """Each digit of wide pictures of three, read from its own third."""
    threes = [range(i, i + 3) for i in range(0, count - count % 3, 3)]
    drawn = []
    for three in threes:
        colours = [list(COLOURS)[i] for i in rng.integers(len(COLOURS), size=3)]
        drawn.append(draw_scene(rng, [glyph_set.images[i] for i in three], colours))
    labels = torch.from_numpy(glyph_set.labels[: 3 * len(threes)])
    return _figure(nearest(model, embed(model, np.stack(drawn)[:, None], regions=3), DIGITS) == labels, 0.1)


def embed(model: ContrastiveModel, frames_BTSS3: np.ndarray, regions: int = 1) -> Tensor:
    """Pooled features [B * regions, D] of uint8 pictures [B, T, S, W, 3], 64 at a time."""
    pixels = torch.from_numpy(frames_BTSS3).float().permute(0, 1, 4, 2, 3)
    pooled = [model.pooled(*patchify(part, model.encoder.config), regions) for part in pixels.split(64)]
    return torch.cat(pooled)


def nearest(model: ContrastiveModel, pooled_BD: Tensor, captions: Sequence[str]) -> Tensor:
    """Index of the caption nearest to each picture."""
    return (model.image_embedding(pooled_BD) @ model.text_embedding(captions).T).argmax(dim=-1)


def _figure(right: Tensor, chance: float) -> dict[str, float]:
    return {"value": round(right.float().mean().item(), 4), "n": right.numel(), "chance": round(chance, 4)}
