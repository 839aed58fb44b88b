"""Minutes of ``make test``: the whole suite but the tests that take minutes each, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from omni_ray.types.errors import OmniError
from pipelines.bench.writer import BenchReport, Figure, environment, not_run

GOAL_MINUTES = 20.0
NAME, AGAINST = "test_minutes", "make test on this machine, install excluded"


def run(*, quick: bool, seed: int) -> BenchReport:
    """Run the suite once; ``quick`` changes nothing, for one run is all there is.

    Args:
        quick: As every bench has it.  seed: Written into the environment; the tests draw from seeds of their own.
    Raises:
        OmniError: a test failed, or none ran; a failing suite has no time worth keeping.
    """
    figures = (suite_minutes(Path(__file__).resolve().parents[2]),)
    return BenchReport(bench="suite", figures=figures, environment=environment(seed=seed, quick=quick))


def suite_minutes(root: Path) -> Figure:
    """The figure of one checkout; ``not_run`` where ``root`` is an installed package without tests."""
    if not (root / "tests").is_dir() or not (root / "Makefile").is_file():
        return not_run(NAME, "needs a checkout with its tests", unit="min", better="lower", goal=GOAL_MINUTES)
    command = [sys.executable, "-m", "pytest", "-m", "not full", "-q"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    minutes = (time.monotonic() - started) / 60
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise OmniError(
            f"the suite ended with exit code {done.returncode} ({last[0]}); run make test and mend it first"
        )
    return Figure(
        name=NAME, value=minutes, unit="min", better="lower", goal=GOAL_MINUTES, against=AGAINST, runs=(minutes,)
    )
