"""Vision encoder, audio encoder and codec trained afresh, each by its documented command, two at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omni_ray.types.errors import CheckpointError, OmniError

NAMES = ("vision", "codec", "audio")
"""In the order of starting: the longest first."""
CARD = "card.json"
"""Written last, so a folder with one is whole."""
AT_A_TIME = 2
ASKED = "asked.json"
"""What the components of a folder were asked for."""


def train_all(
    folder: Path, seed: int, real_data: Path | None, say: Callable[[str], None], *, scale: float = 1.0
) -> Path:
    """Train what is not whole yet.

    Args:
        folder: Gets ``vision/``, ``audio/`` and ``codec/``, each with weights and card, and their logs.
        real_data: Folder of real recordings and pictures; None trains on what packages bring.
        scale: Share of every training's steps, for a try-out.
    Returns:
        ``folder``.
    Raises:
        OmniError: a training failed; its last line is told, its log is kept.
        CheckpointError: ``folder`` holds components of another seed, scale or kind of data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_asked(folder / ASKED, {"seed": seed, "scale": scale, "real_data": real_data is not None})
    missing = [name for name in NAMES if not (folder / name / CARD).is_file()]
    if missing:
        say(f"training components on one core each: {', '.join(missing)}; logs in {folder}")
    with ThreadPoolExecutor(max_workers=AT_A_TIME) as threads:
        for name, _ in zip(
            missing, threads.map(lambda n: _train(n, folder, seed, real_data, scale), missing), strict=True
        ):
            say(f"trained {name}")
    return folder


def component_command(name: str, out: Path, seed: int, scale: float = 1.0) -> list[str]:
    """The documented command; ``-P`` keeps a ``pipelines.py`` in the user's folder out of the way."""
    command = [sys.executable, "-P", "-m", f"pipelines.components.{name}", "--out", str(out), "--seed", str(seed)]
    return command if scale == 1.0 else [*command, "--scale", f"{scale:g}"]


def _check_asked(path: Path, asked: dict[str, Any]) -> None:
    """Parts already trained are kept, so they must be what is asked for now."""
    if not path.is_file():
        path.write_text(json.dumps(asked), encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in asked.items():
        if before.get(name) != value:
            raise CheckpointError(
                f"{path.parent} holds components trained with {name} {before.get(name)}, not {value}; "
                "choose another --out, or remove the folder"
            )


def _train(name: str, folder: Path, seed: int, real_data: Path | None, scale: float) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "OMNI_RAY_REAL_DATA"}
    if real_data is not None:
        variables["OMNI_RAY_REAL_DATA"] = str(real_data)
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as stream:
        command = component_command(name, folder / name, seed, scale)
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=variables, check=False)
    if ended.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise OmniError(f"training the {name} component failed ({last.strip()}); its log is {log}")
