"""Notebooks run from the first cell to the last, each in a process of its own, and hold no output of somebody's run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    document = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == kind]


def run(name: str, folder: Path) -> str:
    """What the cells print."""
    script = folder / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(name, "code")), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_are_notebooks_without_output() -> None:
    assert NAMES == ["networks.ipynb", "pools.ipynb"]
    for name in NAMES:
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name, "code"))


def test_the_networks_by_hand(tmp_path: Path) -> None:
    said = run("networks.ipynb", tmp_path)
    assert "rows of 80 ms" in said
    assert re.search(r"language +560\.", said)


@pytest.mark.ray
@pytest.mark.full
def test_training_on_pools(tmp_path: Path) -> None:
    said = run("pools.ipynb", tmp_path)
    assert "all equal" in said
