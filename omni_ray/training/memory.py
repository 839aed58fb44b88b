"""Memory that a training step frees and the next one takes again."""

from __future__ import annotations

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt(3)
_LARGEST = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library hold on to freed blocks of any size instead of giving them back to the system.

    A training step takes and frees the same gigabytes over and over; a page that comes anew from the system costs
    several times its own writing.  The process then stays as large as its largest step was, and larger where blocks
    of many sizes leave gaps between them.  Numbers do not change.

    Returns:
        Whether the C library took the setting; others than glibc have none, and nothing happens there.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, 64 << 20))
    return all([bool(mallopt(parameter, value)) for parameter, value in settings])
