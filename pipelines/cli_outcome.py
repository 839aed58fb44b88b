"""What a command's handler hands back, and small checks that several handlers share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_ray.types.errors import DataError, MediaError

REAL_DATA_VARIABLE = "OMNI_RAY_REAL_DATA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one command."""

    text: str
    """For people; may be empty."""
    document: Any = None
    """For programs: what ``--json`` prints."""
    ok: bool = True
    """False: the command has said why, and the exit code is 1."""


def real_data_folder() -> Path | None:
    """The folder of real recordings and pictures, absolute, or None where the variable is not set.

    Raises:
        DataError: the variable names no folder.
    """
    named = os.environ.get(REAL_DATA_VARIABLE, "")
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"{REAL_DATA_VARIABLE} names {named!r}, which is no folder; correct it or unset it")
    return folder


def existing_file(path: Path | None, what: str) -> Path | None:
    """The absolute path of a file that the user named, checked before seconds go into loading a model.

    Raises:
        MediaError: there is no such file.
    """
    if path is None:
        return None
    if not path.is_file():
        raise MediaError(f"{what} {str(path)!r} is not a file")
    return path.resolve()


def writable_target(path: Path | None, what: str) -> Path | None:
    """The absolute path of a file to be written, checked before the work and not after it.

    Raises:
        DataError: its folder does not exist or cannot be written.
    """
    if path is None:
        return None
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise DataError(f"{what} {str(path)!r} cannot be written; name a file in a folder that exists and is yours")
    return path.resolve()
