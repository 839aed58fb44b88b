"""omni_ray: the model and its mathematics; one process, torch only, no Ray.

Names resolve when they are first used, so that recipes load without torch and ``import omni_ray`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_ray.config.load import Recipe
    from omni_ray.inference.omni_model import OmniModel, load_model
    from omni_ray.models.audio_encoder import AudioEncoder
    from omni_ray.models.codec import Codec
    from omni_ray.models.llm import LanguageModel
    from omni_ray.models.vision_encoder import VisionEncoder

__version__ = "0.1.0"

_HOME = {
    "AudioEncoder": "omni_ray.models.audio_encoder",
    "Codec": "omni_ray.models.codec",
    "LanguageModel": "omni_ray.models.llm",
    "OmniModel": "omni_ray.inference.omni_model",
    "Recipe": "omni_ray.config.load",
    "VisionEncoder": "omni_ray.models.vision_encoder",
    "load_model": "omni_ray.inference.omni_model",
}
"""Public name -> the module that holds it."""

__all__ = [
    "AudioEncoder",
    "Codec",
    "LanguageModel",
    "OmniModel",
    "Recipe",
    "VisionEncoder",
    "__version__",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'omni_ray' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
