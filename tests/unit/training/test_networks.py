"""Components that do not fit the language model are refused before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mini_world import mini_recipe, write_components

from omni_ray.config.model import model_preset
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.training.networks import check_widths
from omni_ray.types.errors import ConfigError
from pipelines.training.loop import train


def test_component_of_another_width_is_refused_by_name(tmp_path: Path) -> None:
    write_components(tmp_path / "components")
    recipe = mini_recipe(tmp_path)
    check_widths(recipe)
    config = model_preset("tiny").audio.model_copy(update={"output_size": 96})
    AudioEncoder(config).save_pretrained(tmp_path / "components" / "audio")
    folder = re.escape(str(tmp_path / "components" / "audio"))
    with pytest.raises(ConfigError, match=rf"{folder} makes rows 96 wide, yet .* hidden_size is 160; train the comp"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before the run's folder and Ray"
