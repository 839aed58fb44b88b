"""The recipe of the codec's own training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from omni_ray.config.load import load_speech_recipe
from omni_ray.config.speech_training import STAGES
from omni_ray.types.errors import ConfigError


def test_every_stage_of_the_preset_has_phases() -> None:
    recipe = load_speech_recipe("codec-tiny")
    assert [list(recipe.phases(stage)) for stage in STAGES] == [
        ["pretrain"],
        ["ctc"],
        [],
        ["latents", "coded", "wave16"],
        ["mel", "wave", "polish"],
        ["speaker"],
    ]
    assert list(load_speech_recipe("codec-tiny", ["decoder.mel.steps=0"]).phases("2")) == ["wave", "polish"]


def test_a_change_of_one_alias_leaves_the_others() -> None:
    recipe = load_speech_recipe("codec-tiny", ["decoder.polish.adversarial.start=5"])
    assert recipe.decoder.polish.adversarial.start == 5
    assert recipe.speaker.polish.adversarial.start is None
    assert recipe.encoder.wave.adversarial.start is None


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("decoder.polsh.steps=3", "unknown key 'decoder.polsh'; the nearest known key is 'polish'"),
        ("decoder.polish.parts=3", "batch 4 is not a multiple of parts 3; make it one"),
        ("decoder.polish.adversarial.loss=wgan", "decoder.polish.adversarial.loss is 'wgan'"),
        ("decoder.polish.lr=-1", "decoder.polish.lr is -1"),
    ],
)
def test_what_does_not_fit_is_refused(word: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_speech_recipe("codec-tiny", [word])


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(load_speech_recipe("codec-tiny", ["seed=9"]).model_dump(mode="json")))
    assert load_speech_recipe(str(path)).seed == 9
    with pytest.raises(ConfigError, match=r"neither a file nor a preset \(codec-tiny\)"):
        load_speech_recipe("codec-tny")
