"""A whole checkpoint of untrained tiny networks: enough to load, to generate with and to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from omni_ray.checkpoint import store
from omni_ray.config.load import check_recipe, save_recipe
from omni_ray.config.model import model_preset
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.llm import LanguageModel
from omni_ray.models.vision_encoder import VisionEncoder

WORDS = (
    "USER:which digit is it\nASSISTANT:it is a red seven. VOICE ASSISTANT:say blue two SYSTEM:answer in one word "
    "which colour, which way does it move: left, right, up, down second{0.0}: one two three four five six eight nine"
)


def write_tiny_checkpoint(parent: Path, step: int = 3, **sections: Any) -> Path:
    """Write ``parent/step-N``, the same at every call; ``sections`` replace sections of its recipe."""
    model = model_preset("tiny")
    recipe = check_recipe({"size": "tiny", **sections})
    torch.manual_seed(0)
    networks = {
        "vision": VisionEncoder(model.vision),
        "audio": AudioEncoder(model.audio),
        "codec": Codec(model.codec),
        "language": LanguageModel(model.language, seed=0),
    }
    with store.writing(parent, step) as folder:
        for name, network in networks.items():
            network.save_pretrained(folder / "model" / name)
        save_recipe(recipe, folder / "recipe.yaml")
        Tokenizer.learn([WORDS] * 3).save(folder / "tokenizer.json")
        store.write_state(folder, {"step": step, "stage": "", "mixture": {}, "drawn": {}, "seed": recipe.seed})
    return parent / store.checkpoint_name(step)
