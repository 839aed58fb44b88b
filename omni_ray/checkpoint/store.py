"""Checkpoint directories: written to the side, renamed when whole; a folder without COMPLETE is not a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omni_ray.observability.events import emit
from omni_ray.types.errors import CheckpointError

COMPLETE = "COMPLETE"
SIZES = "sizes.json"
"""Bytes of every tensor file when the checkpoint was made: a power cut may shorten files after they were renamed."""
FORMAT = 1
"""Number of the directory layout."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:07d}"


@contextlib.contextmanager
def writing(parent: Path, step: int) -> Iterator[Path]:
    """A folder to write a checkpoint into; becomes ``parent/step-N`` only when the block ends without an error.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints stay as they are.
    """
    side = open_side(parent, step)
    try:
        with written(parent, step):
            yield side
            complete(side, parent / checkpoint_name(step))
    finally:
        shutil.rmtree(side, ignore_errors=True)


@contextlib.contextmanager
def written(parent: Path, step: int) -> Iterator[None]:
    """Turn the system's errors of the block into one that says what is lost (nothing) and what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoint of step {step} could not be written under {parent} ({error.strerror}); "
            "free space or choose another --out; earlier checkpoints are intact"
        ) from error


def open_side(parent: Path, step: int) -> Path:
    """An empty folder beside the checkpoints, to write one into.

    Raises:
        CheckpointError: it cannot be made.
    """
    side = parent / f".writing-{checkpoint_name(step)}"
    with written(parent, step):
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(side, ignore_errors=True)
        side.mkdir()
    return side


def complete(side: Path, target: Path) -> Path:
    """Make a written folder a checkpoint: the last file says it is whole, then it takes its name."""
    (side / "versions.json").write_text(json.dumps(versions(), indent=1), encoding="utf-8")
    sizes = {str(path.relative_to(side)): path.stat().st_size for path in sorted(side.rglob("*.safetensors"))}
    (side / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    (side / COMPLETE).write_text(f"{FORMAT}\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(side, target)
    return target


def sweep(parent: Path) -> None:
    """Remove what interrupted writers left behind."""
    for side in parent.glob(".writing-*"):
        shutil.rmtree(side, ignore_errors=True)


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` whole checkpoints."""
    for folder in whole(parent)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def whole(parent: Path) -> list[Path]:
    """Whole checkpoints under a run's folder, oldest first."""
    return [folder for folder in sorted(parent.glob("step-*")) if not damage(folder)]


def newest(parent: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = whole(parent)
    return found[-1] if found else None


def newest_to_resume(parent: Path) -> Path | None:
    """The newest whole checkpoint; None where no folder of one lies.

    A damaged one that is newer is passed over and told.

    Raises:
        CheckpointError: there are folders of checkpoints, yet none of them is whole: a run that started anew would
            write over them.
    """
    folders = sorted(parent.glob("step-*"))
    found = newest(parent)
    damaged = {folder.name: damage(folder) for folder in folders if found is None or folder > found}
    if damaged and found is None:
        name, what = max(damaged.items())
        raise CheckpointError(
            f"{parent} holds {', '.join(damaged)}, yet no whole checkpoint ({name}: {what}); restore a file, remove "
            "the folders to start anew, or choose another --out"
        )
    for name, what in damaged.items():
        emit("checkpoint_damaged", folder=str(parent / name), problem=what, instead=str(found))
    return found


def damage(folder: Path) -> str:
    """What keeps a folder from being a whole checkpoint; empty for a whole one.

    A checkpoint of an earlier version names no sizes; of it, only the last file is looked for.
    """
    if not (folder / COMPLETE).is_file():
        return f"its {COMPLETE} file is missing"
    if not (folder / SIZES).is_file():
        return ""
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except ValueError:
        return f"{SIZES} cannot be read"
    for name, size in sizes.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else 0
        if there != size:
            return f"{name} has {there} bytes, written were {size}"
    return ""


def check_whole(folder: Path) -> None:
    """Refuse what is not a whole checkpoint.

    Raises:
        CheckpointError: no such folder, no COMPLETE file, a file cut short, or a layout of another number.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist")
    problem = damage(folder)
    if problem:
        hint = newest(folder) or newest(folder / "checkpoints") or newest(folder.parent)
        mend = f"; did you mean {hint}?" if hint else "; it was cut short, or it is another kind of folder"
        raise CheckpointError(f"{folder} is not a whole checkpoint ({problem}){mend}")
    found = (folder / COMPLETE).read_text(encoding="utf-8").strip()
    if found != str(FORMAT):
        raise CheckpointError(f"{folder} has layout {found!r}, this version reads {FORMAT}; re-export it")


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``state.json``: step, stage, data, mixture, random."""
    (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` of a whole checkpoint.

    Raises:
        CheckpointError: not whole, or the file is damaged.
    """
    check_whole(folder)
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read ({error}); use another checkpoint") from error
    return state


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    found = {}
    for package in ("omni-ray", "torch", "ray", "numpy", "safetensors", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
