"""Nested state as one safetensors file: tensors by number, everything around them as JSON; nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omni_ray.types.errors import CheckpointError

FORM = "omni_ray.state"


def save_state(path: Path, state: Any) -> None:
    """Write tensors in dicts (keys: strings and integers), lists and tuples, with JSON's scalars between them.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    owners: set[int] = set()

    def add(tensor: Tensor) -> str:
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in owners or storage.nbytes() != kept.nbytes:
            kept = kept.clone()  # safetensors has no shared memory
        owners.add(kept.untyped_storage().data_ptr())
        name = str(len(tensors))
        tensors[name] = kept
        return name

    def form(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": add(value)}
        if isinstance(value, dict):
            return {"dict": [[key, form(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [form(item) for item in value]}
        return {"is": value}

    save_file(tensors, path, metadata={FORM: json.dumps(form(state))})


def load_state(path: Path) -> Any:
    """What :func:`save_state` wrote; tensors are mapped from the file.

    Raises:
        CheckpointError: the file is not whole, or another one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            form = json.loads((file.metadata() or {})[FORM])
            return _made(form, file)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a state of training ({error}); train that stage again"
        ) from None


def _made(form: dict[str, Any], file: Any) -> Any:
    ((kind, value),) = form.items()
    if kind == "tensor":
        return file.get_tensor(value)
    if kind == "dict":
        return {key: _made(item, file) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_made(item, file) for item in value]
        return items if kind == "list" else tuple(items)
    return value
