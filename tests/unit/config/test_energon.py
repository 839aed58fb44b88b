"""Energon metadatasets become blends: both versions, nesting, splits, subsets; what has no equal is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from omni_ray.config.energon import read_metadataset
from omni_ray.config.load import load_recipe, save_recipe
from omni_ray.types.errors import ConfigError


def written(path: Path, train: Any, **more: Any) -> Path:
    head = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(head | {"splits": {"train": train, **more}}))
    return path


def test_weights_repetitions_and_nesting(tmp_path: Path) -> None:
    passes = {"blend_epochized": [{"repetitions": 5, "path": "./coco"}, {"path": "./coyo", "split_part": "val"}]}
    written(tmp_path / "inner" / "passes.yaml", passes, val={"path": "coco"})
    (tmp_path / "coyo" / ".nv-meta").mkdir(parents=True)
    split = {"split_parts": {"train": ["s_{000..001}.tar"], "val": ["s_002.tar"]}}
    (tmp_path / "coyo" / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    train = {
        "blend": [
            {"weight": 5, "path": "./coco", "subset": {"range": ["0%", "50%"]}, "subflavors": {"a": 1}},
            {"weight": 2, "path": "inner/passes.yaml"},
            {"path": "coyo"},
        ]
    }
    branches, sources = read_metadataset(written(tmp_path / "all.yaml", train))
    assert branches == [
        {"source": "coco", "part": [0.0, 0.5], "weight": 5},
        {"blend": [{"source": "coco-2", "repeat": 5}, {"source": "coyo", "repeat": 1}], "weight": 2},
        {"blend": [{"source": "s_000", "repeat": 1}, {"source": "s_001", "repeat": 1}], "weight": 1},
    ]
    assert sources["coco"] == {"path": str(tmp_path / "coco"), "split": "train"}
    assert sources["coyo"] == {"path": str(tmp_path / "inner" / "coyo"), "split": "val"}
    assert sources["s_001"] == {"path": str(tmp_path / "coyo" / "s_001.tar"), "split": ""}
    assert read_metadataset(tmp_path / "inner" / "passes.yaml", "val")[0] == [{"source": "coco"}]


def test_first_version_and_concat(tmp_path: Path) -> None:
    assert read_metadataset(written(tmp_path / "a.yaml", {"datasets": [{"weight": 3, "path": "x"}]}))[0] == [
        {"source": "x", "weight": 3}
    ]
    assert read_metadataset(written(tmp_path / "b.yaml", {"concat": [{"path": "x"}, {"path": "y"}]}))[0] == [
        {"source": "x", "repeat": 1},
        {"source": "y", "repeat": 1},
    ]


def test_a_recipe_draws_from_it(tmp_path: Path) -> None:
    written(tmp_path / "mix.yaml", {"blend": [{"weight": 3, "path": "x"}, {"weight": 1, "path": "/far/y"}]})
    recipe = load_recipe("tiny").model_dump(mode="json")
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["mixture"] = {"energon": "mix.yaml", "take": {"samples": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))
    mixture = loaded.stages[0].mixture
    assert (mixture.sources, mixture.per) == (("x", "y"), "samples")
    assert loaded.data.sources["y"].path == "/far/y"
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == loaded, "a checkpoint's recipe needs no metadataset"


REFUSED: dict[str, tuple[Any, str]] = {
    "join": ({"join": []}, "train uses 'join', which has no equal here; leave it out"),
    "two kinds": ({"path": "x", "blend": []}, "train has path and blend; one of path, blend, blend_epochized"),
    "absolute": ({"path": "x", "subset": {"range": [0, 10]}}, "write it as {range: [0%, 50%]}, in percent"),
    "circle": ({"path": "m.yaml"}, "contains itself; break the circle"),
    "missing": ({"path": "no.yaml"}, "no.yaml cannot be read: No such file"),
    "no mapping": (["x"], "train holds ['x']; it must be a mapping with path or blend"),
    "other split": ({"path": "m.yaml", "split_part": "test"}, "has no split 'test'; it has train"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(tmp_path: Path, what: str) -> None:
    train, sentence = REFUSED[what]
    with pytest.raises(ConfigError) as caught:
        read_metadataset(written(tmp_path / "m.yaml", train))
    assert sentence in str(caught.value)
