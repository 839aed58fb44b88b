"""What a process holds: counted before and after, the difference is what was not given back."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

POOLED = ("asyncio_", "decode_", "ThreadPoolExecutor")
_PROC = Path("/proc/self")


def process_census() -> dict[str, int]:
    """Process id, threads, tasks of the running event loop, and resident bytes, garbage collected first.

    Workers of bounded pools, which start when they are needed and stay, are no threads here.
    """
    gc.collect()
    return {
        "pid": os.getpid(),
        "threads": sum(not thread.name.startswith(POOLED) for thread in threading.enumerate()),
        "tasks": len(asyncio.all_tasks()),
        "rss_bytes": _resident_bytes(),
    }


def _resident_bytes() -> int:
    try:
        pages = int((_PROC / "statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
