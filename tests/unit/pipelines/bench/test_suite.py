"""The suite bench runs a checkout's tests, and has no figure for a suite that fails or an install without tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_ray.types.errors import OmniError
from pipelines.bench.suite import suite_minutes


def checkout(root: Path, test: str) -> Path:
    (root / "tests").mkdir()
    (root / "Makefile").touch()
    (root / "pytest.ini").write_text("[pytest]\nmarkers = full: long\n")
    (root / "tests" / "test_one.py").write_text(test)
    return root


def test_a_passing_suite_is_timed(tmp_path: Path) -> None:
    figure = suite_minutes(checkout(tmp_path, "def test_one():\n    pass\n"))
    assert figure.value is not None
    assert 0 < figure.value < 20
    assert figure.name == "test_minutes"


def test_a_failing_suite_has_no_figure(tmp_path: Path) -> None:
    with pytest.raises(OmniError, match=r"exit code 1 \(.*1 failed.*\); run make test"):
        suite_minutes(checkout(tmp_path, "def test_one():\n    assert False\n"))


def test_an_installed_package_has_no_tests_to_time(tmp_path: Path) -> None:
    assert suite_minutes(tmp_path).not_run == "needs a checkout with its tests"
