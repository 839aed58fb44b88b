"""Freed memory is taken again without asking the system for fresh pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TOUCH = """
import resource, statistics, torch
from omni_ray.training.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = statistics.median(faults() for _ in range(9))
assert keep_freed_memory() and keep_freed_memory()
print(fresh, statistics.median(faults() for _ in range(40)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_forty_megabytes_come_without_page_faults_once_the_heap_is_warm() -> None:
    done = subprocess.run([sys.executable, "-c", TOUCH], env=dict(os.environ), capture_output=True, text=True)
    fresh, kept = (float(word) for word in done.stdout.split())
    assert fresh > 10, "fresh pages at every turn: what the setting is for"
    assert kept < 5
