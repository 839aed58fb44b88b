"""Freed memory is taken again without asking the system for fresh pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TOUCH = """
import resource, torch
from omni_ray.training.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory() and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""


def pages(keep: bool) -> int:
    command = [sys.executable, "-c", TOUCH.format(keep=keep)]
    return int(subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_hundred_megabytes_come_without_page_faults_the_second_time() -> None:
    assert pages(keep=False) > 20, "fresh pages at every turn: what the setting is for"
    assert pages(keep=True) < 5
