"""Every example of docs/mixtures.md is a recipe that loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from omni_ray.config.load import load_recipe, preset_names

PAGE = Path(__file__).parents[3] / "docs" / "mixtures.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[1].strip() or "plain")
def test_examples_load(example: str, tmp_path: Path) -> None:
    assert "tiny" in preset_names()
    recipe = load_recipe("tiny").model_dump(mode="json")
    recipe["stages"] = [recipe["stages"][1] | yaml.safe_load(example)]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    blend = {"blend": [{"weight": 2, "path": "./coco"}, {"weight": 1, "path": "./coyo"}]}
    (tmp_path / "metadataset.yaml").write_text(yaml.safe_dump({"splits": {"train": blend}}))
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))
    assert loaded.stages[0].mixture.sources
    assert len(EXAMPLES) >= 6
