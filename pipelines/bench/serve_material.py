"""What the serving bench speaks and serves: synthetic speech of any length, and a checkpoint of the tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omni_ray.checkpoint import store
from omni_ray.config.load import check_recipe, save_recipe
from omni_ray.config.model import model_preset
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.llm import LanguageModel
from omni_ray.models.vision_encoder import VisionEncoder

RATE_HZ = 24000
LONGEST_GAP_S = 0.15
"""Pauses inside the speech are cut to this, so that a turn is one turn."""
WORDS = (
    "USER:which digit is it\nASSISTANT:it is a red seven. VOICE ASSISTANT:say blue two SYSTEM:answer in one word "
    "which colour, which way does it move: left, right, up, down second{0.0}: one two three four five six eight nine"
)
PHRASES = (
    "which digit is it",
    "which colour is it",
    "please say blue two",
    "which way does it move",
    "what do you hear",
    "tell me the colour and the digit",
)


def write_checkpoint(parent: Path, serving: dict[str, Any]) -> Path:
    """An untrained checkpoint of size tiny: the arithmetic of a trained one, without its sense."""
    model = model_preset("tiny")
    recipe = check_recipe({"size": "tiny", "serving": serving})
    torch.manual_seed(0)
    networks: dict[str, Any] = {
        "vision": VisionEncoder(model.vision),
        "audio": AudioEncoder(model.audio),
        "codec": Codec(model.codec),
        "language": LanguageModel(model.language, seed=0),
    }
    with store.writing(parent, 1) as folder:
        for name, network in networks.items():
            network.save_pretrained(folder / "model" / name)
        save_recipe(recipe, folder / "recipe.yaml")
        Tokenizer.learn([WORDS] * 3).save(folder / "tokenizer.json")
        store.write_state(folder, {"step": 1, "stage": "", "mixture": {}, "drawn": {}, "seed": recipe.seed})
    return parent / store.checkpoint_name(1)


def speech(seconds: float, seed: int) -> NDArray[np.int16]:
    """Speech of this length at 24 kHz without a pause of more than :data:`LONGEST_GAP_S`.

    Raises:
        ImportError: the synthesiser of the tiny world is not installed.
    """
    from omni_ray.data.audio import resample
    from omni_ray.data.tiny_world.speech import speak, trim

    pieces: list[NDArray[np.float32]] = []
    have = 0
    number = seed
    gap = np.zeros(int(0.08 * RATE_HZ), np.float32)
    while have < seconds * RATE_HZ:
        wave, rate = speak(PHRASES[number % len(PHRASES)], seed=number)
        said = resample(trim(wave, rate, 0.01), rate, RATE_HZ)
        said = 0.3 * said / max(1e-6, float(np.abs(said).max()))
        pieces += [said, gap]
        have += len(said) + len(gap)
        number += 1
    whole = np.concatenate(pieces[:-1])
    whole = whole[len(whole) - min(len(whole), int(seconds * RATE_HZ)) :]
    return np.round(whole * 32767).astype(np.int16)


def quiet(seconds: float, seed: int) -> NDArray[np.int16]:
    """A quiet room, 70 dB under full scale."""
    noise = np.random.default_rng(seed).normal(0, 3e-4, int(seconds * RATE_HZ))
    return np.round(noise * 32767).astype(np.int16)


def last_sound(wave: NDArray[np.int16]) -> int:
    """Sample after the last 10 ms that rise above 50 dB under full scale: the end of the speech."""
    hop = RATE_HZ // 100
    frames = wave[: len(wave) // hop * hop].reshape(-1, hop).astype(np.float64) / 32768
    loud = np.flatnonzero(np.sqrt(np.square(frames).mean(axis=1)) > 10 ** (-50 / 20))
    return int(loud[-1] + 1) * hop if len(loud) else 0
