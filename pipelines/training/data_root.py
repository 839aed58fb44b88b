"""Where a recipe's data lies: its own root, or the tiny world in the user's cache, built on first use."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from omni_ray.config.places import cache_folder
from omni_ray.config.recipe import Recipe
from omni_ray.types.errors import DataError


def real_data_folder() -> Path | None:
    """The folder of real recordings and pictures named by ``OMNI_RAY_REAL_DATA``, if any.

    Raises:
        DataError: the variable names a folder that does not exist.
    """
    named = os.environ.get("OMNI_RAY_REAL_DATA")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise DataError(f"OMNI_RAY_REAL_DATA names {named!r}, which is no folder; unset it or correct it")
    return folder


def data_root(recipe: Recipe) -> Path:
    """The recipe's data root; the tiny world is built when the recipe names none and the cache lacks it.

    Raises:
        DataError: a named root has no manifest.
    """
    if recipe.data.root is not None:
        if not (recipe.data.root / "manifest.json").is_file():
            raise DataError(f"data.root {recipe.data.root} has no manifest.json; run `omni-ray data build tiny-world`")
        return recipe.data.root
    from omni_ray.data.tiny_world.build import build_tiny_world

    real = real_data_folder()
    out = cache_folder() / ("tiny-world-real" if real else "tiny-world")
    build_tiny_world(out, real_data=real)
    return out


def data_fingerprint(root: Path) -> str:
    """Hash of the manifest, which holds the hash of every shard."""
    return hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()[:16]
