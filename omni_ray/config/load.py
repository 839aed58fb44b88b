"""Recipes from YAML, presets and ``--set`` words; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from omni_ray.config.energon import expand_energon
from omni_ray.config.recipe import Recipe
from omni_ray.config.speech_training import SpeechRecipe
from omni_ray.types.errors import ConfigError

RECIPES, COMPONENT_RECIPES = "recipes", "component_recipes"
"""Folders of presets: of whole curricula, and of components' own trainings."""


def preset_names(folder: str = RECIPES) -> list[str]:
    """Recipes that ship with the package."""
    entries = resources.files("omni_ray.config").joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_speech_recipe(path_or_preset: str, overrides: list[str] | None = None) -> SpeechRecipe:
    """As :func:`load_recipe`, for the codec's own training (``codec-tiny``).

    Raises:
        ConfigError: names the key and its nearest known one, or the value and the mend.
    """
    raw = _read(path_or_preset, COMPONENT_RECIPES)
    for word in overrides or []:
        _override(raw, word)
    try:
        return SpeechRecipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_sentence(error, path_or_preset, SpeechRecipe)) from None


def load_recipe(path_or_preset: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path_or_preset: Preset name (``tiny``) or path of a YAML file.
        overrides: Words ``a.b=value``; the value is read as YAML; list items by number (``stages.0.steps=10``) or,
            for stages, by name (``stages.S1.steps=10``).

    Raises:
        ConfigError: names the key and its nearest known one, or the value and the mend.
    """
    raw = _read(path_or_preset)
    for word in overrides or []:
        _override(raw, word)
    expand_energon(raw, Path(path_or_preset).parent)
    return check_recipe(raw, path_or_preset)


def check_recipe(raw: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a plain mapping; one clear sentence for the first thing that is wrong."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_sentence(error, name)) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe that :func:`load_recipe` reads back equal."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _read(path_or_preset: str, folder: str = RECIPES) -> dict[str, Any]:
    known = preset_names(folder)
    if path_or_preset in known:
        text = resources.files("omni_ray.config").joinpath(folder, f"{path_or_preset}.yaml").read_text("utf-8")
    else:
        path = Path(path_or_preset)
        if not path.is_file():
            close = difflib.get_close_matches(path_or_preset, known, n=1)
            hint = f"; did you mean the preset {close[0]!r}?" if close else ""
            raise ConfigError(f"recipe {path_or_preset!r} is neither a file nor a preset ({', '.join(known)}){hint}")
        text = path.read_text("utf-8")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path_or_preset!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path_or_preset!r} holds {type(raw).__name__}; a mapping of settings is needed")
    unshared: dict[str, Any] = _unshared(raw)
    return unshared


def _unshared(node: Any) -> Any:
    """A copy in which YAML's aliases are values of their own: changing one place must not change the others."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _override(raw: dict[str, Any], word: str) -> None:
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {word!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {word!r}: the value is not YAML") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text; users mean the number
        with contextlib.suppress(ValueError):
            value = float(value)
    node: Any = raw
    keys = path.split(".")
    for key in keys[:-1]:
        node = _descend(node, key, word)
    if isinstance(node, list):
        node[_place(node, keys[-1], word)] = value
    else:
        node[keys[-1]] = value


def _descend(node: Any, key: str, word: str) -> Any:
    if isinstance(node, list):
        return node[_place(node, key, word)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {word!r}: {key!r} lies below a plain value")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _place(node: list[Any], key: str, word: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in node]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(node):
        return int(key)
    raise ConfigError(f"--set {word!r}: {key!r} is neither a name nor a number below {len(node)}")


def _sentence(error: ValidationError, name: str, model: type[BaseModel] = Recipe) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        near = f"; the nearest known key is {close[0]!r}" if close else ""
        return f"recipe {name!r}: unknown key {where!r}{near}"
    if first["type"] == "value_error":  # our own ConfigError, raised inside a validator
        return f"recipe {name!r}: {first['ctx']['error']}"
    return f"recipe {name!r}: {where} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_keys(model: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that the path leads to, through optionals, tuples and mappings."""
    for part in loc:
        if isinstance(part, int):  # the item of a tuple; its model is unwrapped already
            continue
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        elif isinstance(model, type) and issubclass(model, BaseModel):
            return list(model.model_fields)
        model = _unwrap(model)
    is_model = isinstance(model, type) and issubclass(model, BaseModel)
    return list(model.model_fields) if is_model else []


def _unwrap(annotation: Any) -> Any:
    origin = typing.get_origin(annotation)
    if origin in (tuple, list):
        return typing.get_args(annotation)[0]
    if origin is dict:
        return typing.get_args(annotation)[1]
    if origin in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation
