"""A folder of safetensors, one file or shards with an index: written by shards, mapped when read, checked by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omni_ray.types.errors import CheckpointError

SHARD_BYTES = 4 * 2**30
"""Largest file of a sharded checkpoint."""
REMAP_BYTES = 64 * 2**20
"""Bytes read from one mapping before it is made anew."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def write_safetensors(
    folder: Path, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], max_shard_bytes: int = SHARD_BYTES
) -> None:
    """One ``model.safetensors``, or ``model-0000i-of-0000n.safetensors`` with an index when it would be larger.

    Args:
        folder: Where to.  tensors: By name; pairs may be made one after another, only one shard is held at a time.
        max_shard_bytes: Most bytes of values in one file (a larger tensor has a file of its own).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / SINGLE_NAME, folder / INDEX_NAME):
        stale.unlink(missing_ok=True)
    shard: dict[str, Tensor] = {}
    written: list[list[str]] = []
    filled = total = 0
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > max_shard_bytes:
            written.append(_write_shard(shard, folder, len(written)))
            shard, filled = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        filled, total = filled + size, total + size
    written.append(_write_shard(shard, folder, len(written)))
    if len(written) == 1:
        _part(folder, 0).replace(folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        _part(folder, number).replace(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + os.linesep)


def _part(folder: Path, number: int) -> Path:
    return folder / f".part-{number:05d}"


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    save_file(shard, _part(folder, number), metadata={"format": "pt"})
    # safetensors opens its file for the owner alone; a model is read by everyone.
    _part(folder, number).chmod(0o644)
    return list(shard)


class SafetensorsFolder:
    """Lazy, memory-mapped view of a folder's tensors by name."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError: no safetensors here, or a file is truncated or missing."""
        self.folder = folder
        self._touched: dict[str, int] = {}
        self._file_of: dict[str, str]
        if (folder / INDEX_NAME).is_file():
            self._file_of = _read_index(folder / INDEX_NAME)
            self._open = {file: _open(folder / file) for file in sorted(set(self._file_of.values()))}
            for name, file in self._file_of.items():
                if name not in self._open[file].keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    raise CheckpointError(f"{folder / file} lacks {name}, which {INDEX_NAME} promises; fetch it again")
        elif (folder / SINGLE_NAME).is_file():
            self._open = {SINGLE_NAME: _open(folder / SINGLE_NAME)}
            self._file_of = dict.fromkeys(self._open[SINGLE_NAME].keys(), SINGLE_NAME)
        else:
            raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a model folder")

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the values."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """A view of the mapped file; it keeps the mapping alive, so copy what is kept for long."""
        file = self._file_of[name]
        if self._touched.get(file, 0) > REMAP_BYTES:
            # Pages once read count as this process's memory until the mapping goes: a fresh one lets them go.
            self._open[file] = _open(self.folder / file)
            self._touched[file] = 0
        tensor: Tensor = self._open[file].get_tensor(name)
        self._touched[file] = self._touched.get(file, 0) + tensor.numel() * tensor.element_size()
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no index of shards ({type(error).__name__}: {error}); fetch it again"
        ) from error
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing though {INDEX_NAME} names it; fetch it again") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error


def check_names(
    source: SafetensorsFolder, targets: Mapping[str, Tensor], passed_over: Callable[[str], bool] = lambda name: False
) -> None:
    """Compare names and shapes, values unread.

    Args:
        source: Where from.
        targets: Tensors of the model (the meta device will do), by the name in the files.
        passed_over: Names that may lie in the files and are not for this model.
    Raises:
        CheckpointError: a tensor is missing, foreign, or of another shape.
    """
    names = source.names()
    missing = sorted(set(targets) - names)
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {_first(missing)} of shape {list(targets[missing[0]].shape)}; "
            "is config.json of another model?"
        )
    foreign = sorted(n for n in names - set(targets) if not passed_over(n))
    if foreign:
        raise CheckpointError(
            f"{source.folder} holds {_first(foreign)} of shape {list(source.shape(foreign[0]))}, which this model "
            "does not have; is config.json of another model?"
        )
    for name, target in targets.items():
        found = source.shape(name)
        if found != tuple(target.shape):
            raise CheckpointError(
                f"tensor {name} in {source.folder}: expected shape {list(target.shape)}, found {list(found)}; "
                "is config.json of another model?"
            )


@torch.no_grad()
def copy_checked(
    source: SafetensorsFolder, targets: Mapping[str, Tensor], passed_over: Callable[[str], bool] = lambda name: False
) -> None:
    """Copy every target from the files, one tensor at a time; arguments and errors of :func:`check_names`."""
    check_names(source, targets, passed_over)
    for name, target in targets.items():
        target.copy_(source[name])


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors," if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"
