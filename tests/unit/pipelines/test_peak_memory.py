"""Memory of a process tree: what a child holds counts, what two processes share counts once."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import shared_memory

import numpy as np
import pytest

from pipelines.peak_memory import PeakMemory, tree_bytes

MIB = 2**20
HOLD = "import sys\nheld = bytearray(b'x' * {size})\nprint('held', flush=True)\nsys.stdin.readline()\n"
ATTACH = (
    "import sys\nfrom multiprocessing import resource_tracker, shared_memory\n"
    "resource_tracker.register = lambda *names: None\n"
    "block = shared_memory.SharedMemory('{name}')\nseen = sum(block.buf[::4096])\n"
    "print('held', flush=True)\nsys.stdin.readline()\nblock.close()\n"
)


def started(code: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_what_a_child_holds_counts_until_it_ends() -> None:
    before = tree_bytes()
    with PeakMemory(every_s=60) as memory:
        child = started(HOLD.format(size=80 * MIB))
        held = memory.look()
        child.communicate("\n")
    assert held - before > 75 * MIB
    assert memory.peak_bytes >= held
    assert tree_bytes() - before < 40 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared pages are told apart on Linux alone")
def test_shared_pages_count_once() -> None:
    block = shared_memory.SharedMemory(create=True, size=80 * MIB)
    try:
        np.frombuffer(block.buf, np.uint8)[:] = 1
        before = tree_bytes()
        children = [started(ATTACH.format(name=block.name)) for _ in range(2)]
        held = tree_bytes()
        for child in children:
            child.communicate("\n")
        assert held - before < 70 * MIB
    finally:
        block.close()
        block.unlink()
