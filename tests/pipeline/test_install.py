"""The install step of the Makefile: done once, whole or not at all, refused with the mend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[build-system]
requires = []
build-backend = "builder"
backend-path = ["."]
[project]
name = "house-of-cards"
version = "1"
"""
BUILDER = """
import zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "house_of_cards-1-py3-none-any.whl", "house_of_cards-1.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: house-of-cards\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
"""A build backend small enough to stand here, so that the install step runs whole without asking an index."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A tiny project under this project's Makefile, without dependencies, so that no index is asked."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "builder.py").write_text(BUILDER)
    (tmp_path / "requirements.lock").write_text("")
    return tmp_path


def make(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"}
    command = ["make", "--no-print-directory", f"PYTHON={base_python()}", *words]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def base_python() -> str:
    """The interpreter that this environment was made from."""
    return getattr(sys, "_base_executable", sys.executable)


@pytest.mark.slow
def test_install_once_again_and_after_an_interruption(project: Path) -> None:
    stamp = project / ".venv/.installed"
    first = make(project, "install")
    assert first.returncode == 0, first.stderr
    assert stamp.read_text().strip().isdigit()
    assert subprocess.run(
        [project / ".venv/bin/python", "-m", "pip", "show", "house-of-cards"], capture_output=True
    ).stdout
    assert make(project, "-q", "install").returncode == 0, "a second run has nothing to do"

    # An install that was begun and killed: the stamp is gone, the mark of the beginning is there.
    stamp.unlink()
    (project / ".venv/.installing").touch()
    (project / ".venv/half-copied").touch()
    again = make(project, "install")
    assert again.returncode == 0, again.stderr
    assert "an earlier install was interrupted; starting afresh" in again.stderr
    assert not (project / ".venv/half-copied").exists()
    assert stamp.exists()
    assert not (project / ".venv/.installing").exists()

    # A changed lock that cannot be satisfied: no stamp, and the next run does not take the rest for whole.
    (project / "requirements.lock").write_text(f"no-such-package==1 --hash=sha256:{'0' * 64}\n")
    os.utime(project / "requirements.lock", (2**31 - 10, 2**31 - 10))
    failed = make(project, "install")
    assert failed.returncode != 0
    assert not stamp.exists()
    assert (project / ".venv/.installing").exists()


def test_a_python_that_does_not_fit_is_refused_with_the_mend(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "python-of-old"
    other.write_text(
        f'#!/bin/sh\nexec {base_python()} -c "import sys; sys.version_info = (3, 8); exec(sys.argv[1])" "$2"\n'
    )
    other.chmod(0o755)
    done = make(project, f"PYTHON={other}", "install")
    assert done.returncode != 0
    assert "omni-ray is pinned for Python 3.11;" in done.stderr
    assert "Name one: make PYTHON=/path/to/python3.11" in done.stderr
    assert not (project / ".venv/.installed").exists()


def test_help_names_every_target(project: Path) -> None:
    shown = make(project, "help").stdout
    for target in ("quickstart", "test", "test-fast", "test-full", "check", "serve", "docs", "bench", "clean"):
        assert f"make {target} " in shown
