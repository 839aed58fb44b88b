"""Joining a Ray cluster, or starting a small local one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import ray

from omni_ray.types.errors import ResourceError

OBJECT_STORE_BYTES = 1_000_000_000
LOCAL_CPUS = 8
"""Logical CPUs of a local start: pools of a laptop share its cores."""


@contextlib.contextmanager
def local_or_joined(num_cpus: int = LOCAL_CPUS) -> Iterator[None]:
    """Use the running Ray of this process or RAY_ADDRESS; else start a local one and stop it at the end.

    Raises:
        ResourceError: too little shared memory for the object store.
    """
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        _start_local(num_cpus)
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(num_cpus: int) -> None:
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else OBJECT_STORE_BYTES * 2
    if free < OBJECT_STORE_BYTES:
        raise ResourceError(
            f"/dev/shm has {free / 1e6:.0f} MB free, yet the object store needs {OBJECT_STORE_BYTES / 1e6:.0f} MB; "
            "free it, or run the container with --shm-size=2g"
        )
    ray.init(
        num_cpus=max(num_cpus, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=bool(os.environ.get("OMNI_RAY_WORKER_LOGS")),
        logging_level="ERROR",
        configure_logging=True,
    )
