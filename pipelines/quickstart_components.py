"""Vision encoder, audio encoder and codec trained afresh, each by its documented command, two at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omni_ray.types.errors import OmniError

NAMES = ("vision", "codec", "audio")
"""In the order of starting: the longest first."""
CARD = "card.json"
"""Written last, so a folder with one is whole."""
AT_A_TIME = 2


def train_all(folder: Path, seed: int, real_data: Path | None, say: Callable[[str], None]) -> Path:
    """Train what is not whole yet.

    Args:
        folder: Gets ``vision/``, ``audio/`` and ``codec/``, each with weights and card, and their logs.
        real_data: Folder of real recordings and pictures; None trains on what packages bring.
    Returns:
        ``folder``.
    Raises:
        OmniError: a training failed; its last line is told, its log is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in NAMES if not (folder / name / CARD).is_file()]
    if missing:
        say(f"training components on one core each: {', '.join(missing)}; logs in {folder}")
    with ThreadPoolExecutor(max_workers=AT_A_TIME) as threads:
        for name, _ in zip(missing, threads.map(lambda n: _train(n, folder, seed, real_data), missing), strict=True):
            say(f"trained {name}")
    return folder


def component_command(name: str, out: Path, seed: int) -> list[str]:
    """The documented command; ``-P`` keeps a ``pipelines.py`` in the user's folder out of the way."""
    return [sys.executable, "-P", "-m", f"pipelines.components.{name}", "--out", str(out), "--seed", str(seed)]


def _train(name: str, folder: Path, seed: int, real_data: Path | None) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "OMNI_RAY_REAL_DATA"}
    if real_data is not None:
        variables["OMNI_RAY_REAL_DATA"] = str(real_data)
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as stream:
        command = component_command(name, folder / name, seed)
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=variables, check=False)
    if ended.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise OmniError(f"training the {name} component failed ({last.strip()}); its log is {log}")
