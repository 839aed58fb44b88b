"""Shipped components: small, loadable, with cards; nothing held out was in their training."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from omni_ray.config.load import load_recipe
from omni_ray.data.tiny_world.pictures import load_glyphs
from omni_ray.data.tiny_world.speech import HELD_OUT_VOICES
from omni_ray.data.tiny_world.words import pairs, phrase
from omni_ray.training.networks import build_network

NAMES = ("vision", "audio", "codec")
HELD_OUT_PERSON = "yweweler"
LIMIT_MB = 8.0


def folder(name: str) -> Path:
    return Path(str(resources.files("omni_ray").joinpath("assets", name)))


def card(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder(name) / "card.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_card_says_how_the_weights_were_made(name: str) -> None:
    found = card(name)
    for field in ("command", "seed", "figures", "training_data", "held_out", "licences"):
        assert found[field] or found[field] == 0, field
    assert len(found["training_data"]["sha256"]) == 64
    minutes = found.get("cpu_minutes", found.get("minutes"))
    assert minutes > 0


@pytest.mark.parametrize("name", NAMES)
def test_component_loads_at_the_tiny_size(name: str) -> None:
    network = build_network(name, load_recipe("tiny"))
    assert sum(p.numel() for p in network.parameters()) > 100_000


def test_all_components_together_stay_small() -> None:
    total = sum(path.stat().st_size for name in NAMES for path in folder(name).iterdir())
    assert total / 1e6 <= LIMIT_MB


def test_no_held_out_picture_was_trained_on() -> None:
    glyphs = load_glyphs(None)
    held_out = {int(name.rsplit("-", 1)[1]) for name in glyphs.held_out_sklearn.ids}
    trained = numbers(card("vision")["training_data"]["ids"], "sklearn")
    assert trained
    assert held_out
    assert not trained & held_out
    assert not numbers(card("vision")["training_data"]["ids"], "mnist") & set(range(3600, 5000))


@pytest.mark.parametrize("name", ["audio", "codec"])
def test_no_held_out_voice_or_person_was_trained_on(name: str) -> None:
    found = card(name)
    heard = json.dumps(found["training_data"])
    assert HELD_OUT_PERSON not in heard
    assert found["held_out"]["people"] == [HELD_OUT_PERSON]
    assert set(found["held_out"]["voices"]) == {voice.name for voice in HELD_OUT_VOICES}
    assert not [voice.name for voice in HELD_OUT_VOICES if f'"{voice.name}"' in heard]


def test_codec_card_names_the_unspoken_phrases() -> None:
    assert set(card("codec")["held_out"]["combinations"]) == {phrase(*pair) for pair in pairs(held_out=True)}


def numbers(ranges: list[str], origin: str) -> set[int]:
    """``sklearn-0000..sklearn-1399`` to its numbers."""
    found: set[int] = set()
    for words in ranges:
        first, _, last = words.partition("..")
        if first.startswith(f"{origin}-"):
            start = int(first.rsplit("-", 1)[1])
            found |= set(range(start, int((last or first).rsplit("-", 1)[1]) + 1))
    return found
