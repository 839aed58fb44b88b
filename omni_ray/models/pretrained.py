"""One network in one folder: ``config.json`` and ``model.safetensors``; refused by name when it does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_ray.types.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

ConfigT = TypeVar("ConfigT", bound=BaseModel)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Pretrained(nn.Module):
    """A network that is built from its settings alone and lives in a folder of its own."""

    MODEL_TYPE: ClassVar[str]
    """Name in ``config.json``."""
    CONFIG: ClassVar[type[BaseModel]]
    """Class of its settings."""
    KIND: ClassVar[str]
    """In words, with its article."""
    config: Any

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors`` (values stored as ``dtype``)."""
        save_module(self, self.config, Path(folder), model_type=self.MODEL_TYPE, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Load a folder of :meth:`save_pretrained` as fp32, in eval mode (no dropout).

        Raises:
            CheckpointError: not such a folder, cut short, or with other shapes than its config says.
        """
        config = read_config(Path(folder), cls.CONFIG, model_type=cls.MODEL_TYPE)
        with torch.device("meta"):
            network = cls(config)
        return load_weights(network, Path(folder), what=cls.KIND).eval()


def save_module(module: nn.Module, config: BaseModel, folder: Path, *, model_type: str, dtype: torch.dtype) -> None:
    """Write a network and its settings; each file is written to the side and renamed, so none is ever half there.

    Args:
        dtype: How floating tensors are stored: float32, float16 or bfloat16.
    Raises:
        CheckpointError: another ``dtype``, or a value that float16 cannot hold.
    """
    if dtype not in FLOATS:
        raise CheckpointError(f"{model_type} cannot be stored as {dtype}; choose one of {', '.join(map(str, FLOATS))}")
    tensors = {}
    for name, tensor in module.state_dict().items():
        stored = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        if tensor.is_floating_point() and not torch.isfinite(stored).all():
            raise CheckpointError(f"{model_type}: {name} holds values that {dtype} cannot; store it as torch.float32")
        tensors[name] = stored
    write_folder(folder, tensors, config, model_type=model_type)


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: BaseModel, *, model_type: str) -> None:
    """Write tensors as they are, and the settings; each file is written to the side and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    side = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, side, metadata={"format": "pt"})
    # safetensors opens its file for the owner alone; a shipped model is read by everyone.
    side.chmod(0o644)
    side.replace(folder / WEIGHTS_FILE)
    described = {"model_type": model_type, **config.model_dump(mode="json")}
    side = folder / f".{CONFIG_FILE}.{os.getpid()}"
    side.write_text(json.dumps(described, indent=2) + "\n")
    side.replace(folder / CONFIG_FILE)


def read_config(folder: Path, config_type: type[ConfigT], *, model_type: str) -> ConfigT:
    """Settings of a folder written by :func:`save_module`.

    Raises:
        CheckpointError: no such folder, another network's folder, or settings that cannot be.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}; name a folder written by save_pretrained")
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        found = raw.pop("model_type", None)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); save the model again") from error
    if found != model_type:
        raise CheckpointError(f"{path} says model_type {found!r}, expected {model_type!r}; name the right folder")
    try:
        return config_type.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(f"{path}: {key}: {first['msg']}; it was written by another version") from error


def load_weights(module: ModuleT, folder: Path, *, what: str) -> ModuleT:
    """Fill a network (usually built on the meta device) from the folder's weights, as fp32.

    Weights stored as fp32 become views of the mapped file: nothing is read before it is used, nothing held twice.

    Raises:
        CheckpointError: weights are missing, cut short, foreign, or have another shape.
    """
    found = read_tensors(folder, module.state_dict(), what=what)
    for name, value in found.items():
        found[name] = value.float() if value.is_floating_point() else value
    module.load_state_dict(found, assign=True)
    return module


def read_tensors(folder: Path, expected: Mapping[str, Tensor], *, what: str) -> dict[str, Tensor]:
    """The folder's weights as stored, mapped into memory, once names and shapes are those of the network.

    Raises:
        CheckpointError: weights are missing, cut short, foreign, or have another shape.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}; name a folder written by save_pretrained")
    try:
        found = load_file(path)
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is cut short or not safetensors: {error}; copy it again"
        ) from error
    check_tensors(expected, found, path, what=what)
    return found


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, *, what: str) -> None:
    """Refuse weights whose names or shapes are not the network's.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown to it"
        raise CheckpointError(
            f"{path} does not hold {what}: {problem} ({len(missing)} missing, {len(unknown)} unknown of "
            f"{len(expected)} tensors); name the right folder"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found[name].shape)}, expected {list(tensor.shape)} by its "
                f"{CONFIG_FILE}; weights and settings are from different models"
            )
