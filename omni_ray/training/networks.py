"""The networks a recipe starts from: components loaded, the language model new from the seed."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

from torch import nn

from omni_ray.config.recipe import Recipe
from omni_ray.types.errors import ConfigError

POOLS = ("language", "vision", "audio")
"""Pools that train, in the order in which norms are summed."""
COMPONENTS = ("vision", "audio", "codec")
"""Networks that enter the curriculum pretrained."""


def component_folder(recipe: Recipe, name: str) -> Path:
    """Where a recipe's pretrained component lies: shipped with the package, or in the folder it names.

    Raises:
        ConfigError: the folder does not hold the component.
    """
    if recipe.components == "train":
        raise ConfigError(
            "components: train must be resolved to a folder first; run `omni-ray quickstart` or train them"
        )
    if recipe.components == "shipped":
        folder = Path(str(resources.files("omni_ray").joinpath("assets", name)))
    else:
        folder = Path(recipe.components) / name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"components is {recipe.components!r}, yet {folder} holds no {name} component (config.json is missing); "
            "choose shipped, or a folder with vision/, audio/ and codec/"
        )
    return folder


def check_widths(recipe: Recipe) -> None:
    """Refuse, before anything starts, encoders whose rows do not fit the language model.

    Raises:
        ConfigError: names the component, its width, the language model's and the mend.
    """
    hidden = recipe.networks.language.hidden_size
    for name in ("vision", "audio"):
        folder = component_folder(recipe, name)
        try:
            width = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("output_size", hidden)
        except ValueError as error:
            raise ConfigError(f"{folder / 'config.json'} is no JSON ({error}); restore it") from error
        if width != hidden:
            raise ConfigError(
                f"{folder} makes rows {width} wide, yet the language model's hidden_size is {hidden}; train the "
                f"component with output_size {hidden}, or choose a model section with hidden_size {width}"
            )


def components_fingerprint(recipe: Recipe) -> str:
    """Hash over the weights of the pretrained components a recipe starts from, wherever they lie.

    Raises:
        ConfigError: a component is not there.
    """
    whole = hashlib.sha256()
    for name in COMPONENTS:
        weights = component_folder(recipe, name) / "model.safetensors"
        try:
            whole.update(hashlib.sha256(weights.read_bytes()).digest())
        except OSError as error:
            raise ConfigError(
                f"{weights} cannot be read ({error.strerror}); restore it, or name other components"
            ) from error
    return whole.hexdigest()[:16]


def build_network(name: str, recipe: Recipe, folder: Path | None = None) -> nn.Module:
    """Build one network: from ``folder`` (a checkpoint's model part) or as the recipe starts.

    Args:
        name: language, vision, audio or codec.  recipe: The run.  folder: Trained weights, or None to start.
    """
    networks = recipe.networks
    if name == "language":
        from omni_ray.models.llm import LanguageModel

        if folder is not None:
            return LanguageModel.from_pretrained(folder)
        model = LanguageModel(networks.language)
        model.init_weights(recipe.seed)
        return model
    source = folder or component_folder(recipe, name)
    if name == "vision":
        from omni_ray.models.vision_encoder import VisionEncoder

        return VisionEncoder.from_pretrained(source)
    if name == "audio":
        from omni_ray.models.audio_encoder import AudioEncoder

        return AudioEncoder.from_pretrained(source)
    from omni_ray.models.codec import Codec

    return Codec.from_pretrained(source)
