"""Start or join a Ray cluster so that workers import this distribution, keep to themselves, and end with the driver."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import ray

from omni_ray.types.errors import ResourceError

LOCAL_CPUS = 8
"""Ray's CPUs are tickets, not cores; eight let a small machine hold the tiny pools."""
DEFAULT_OBJECT_STORE_BYTES = 500_000_000
MIN_OBJECT_STORE_BYTES = 80_000_000
"""Ray refuses stores under 75 MiB."""
SHARED_MEMORY = Path("/dev/shm")
ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
"""Set for the cluster where the user has set nothing: no reports to outside, GPUs left visible, one thread a
worker, and no traceback for each call that a lost actor takes with it (the run itself reports the loss)."""


@contextmanager
def local_or_joined(num_cpus: int = LOCAL_CPUS) -> Iterator[None]:
    """Use this process's connection or ``RAY_ADDRESS``; else a local cluster for the length of the block.

    Raises:
        ResourceError: too little shared memory for the object store.
    """
    with RaySession(num_cpus=max(num_cpus, os.cpu_count() or 1)):
        yield


class RaySession:
    """A driver's hold on a cluster; closing it ends what it started and nothing else.

    Args:
        num_cpus: Logical CPUs of a local cluster.
        resources: Custom resources of a local cluster, for instance ``{"vision_gpu": 1}``.
        address: A running cluster (default: ``RAY_ADDRESS``); without one a local cluster is started.

    Where the driver is already connected (a test's fixture, a Ray job), that connection is used and left open.
    Workers do not share the driver's working directory: give them absolute paths.

    Raises:
        ResourceError: too little shared memory, or no cluster at the address.
    """

    def __init__(
        self,
        *,
        num_cpus: int = LOCAL_CPUS,
        resources: Mapping[str, float] | None = None,
        address: str | None = None,
    ) -> None:
        self.owns_connection = not ray.is_initialized()
        self._folder: Path | None = None
        self._added: list[str] = []
        if not self.owns_connection:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="omni-", dir=_short_temp_root()))
        try:
            self._connect(self._folder, num_cpus, resources, address or os.environ.get("RAY_ADDRESS"))
        except BaseException:
            self.close()
            raise

    def _connect(self, folder: Path, num_cpus: int, resources: Mapping[str, float] | None, address: str | None) -> None:
        self._set_environment(local=address is None)
        worker_logs = bool(os.environ.get("OMNI_RAY_WORKER_LOGS"))
        with _working_directory(folder):
            if address is not None:
                try:
                    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=worker_logs)
                except ConnectionError as problem:
                    raise ResourceError(f"no Ray cluster answers at {address!r}: {problem}") from problem
                return
            store_bytes = object_store_bytes()
            check_shared_memory(store_bytes)
            ray.init(
                num_cpus=num_cpus,
                resources=dict(resources or {}),
                object_store_memory=store_bytes,
                include_dashboard=False,
                _temp_dir=str(folder / "ray"),
                logging_level=logging.ERROR,
                log_to_driver=worker_logs,
            )

    def _set_environment(self, *, local: bool) -> None:
        chosen = dict(ENVIRONMENT)
        if local and "RAY_AUTH_MODE" not in os.environ:
            # A local cluster gets its own secret; otherwise Ray writes one into the home folder, and every later
            # cluster and client of this user changes its behaviour because that file exists.
            chosen |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        for name, value in chosen.items():
            if name not in os.environ:
                self._added.append(name)
                os.environ[name] = value
        _reread_authentication()

    def close(self) -> None:
        """Disconnect, end a cluster started here, remove its files; may be called twice."""
        if not self.owns_connection:
            return
        self.owns_connection = False
        ray.shutdown()
        for name in self._added:
            os.environ.pop(name, None)
        self._added.clear()
        _reread_authentication()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def check_shared_memory(needed_bytes: int, folder: Path = SHARED_MEMORY) -> None:
    """Refuse to start where shared memory is smaller than the object store.

    Raises:
        ResourceError: names both sizes and the mend.
    """
    if not folder.is_dir():
        return  # not Linux; Ray then keeps its store in the temporary folder
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{folder} has {free_bytes / 1e6:.0f} MB free, yet the object store needs {needed_bytes / 1e6:.0f} MB; "
            "enlarge it (docker run --shm-size=1g) or set OMNI_RAY_OBJECT_STORE_MB to a smaller number (at least 80)"
        )


def object_store_bytes() -> int:
    """Size of the object store: ``OMNI_RAY_OBJECT_STORE_MB`` or the default.

    Raises:
        ResourceError: the variable is not a number, or below what Ray can use.
    """
    text = os.environ.get("OMNI_RAY_OBJECT_STORE_MB", "")
    if not text:
        return DEFAULT_OBJECT_STORE_BYTES
    if not text.isdigit() or int(text) * 1_000_000 < MIN_OBJECT_STORE_BYTES:
        raise ResourceError(f"OMNI_RAY_OBJECT_STORE_MB is {text!r}; it must be a whole number, 80 or more")
    return int(text) * 1_000_000


def _reread_authentication() -> None:
    """Make this process's Ray look at ``RAY_AUTH_*`` again: it reads them once, when it is imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _short_temp_root() -> str:
    """Ray's sockets lie under its temporary folder, and a socket's path may have 107 bytes at most."""
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()


@contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    """Stand in ``folder`` while connecting.

    Ray puts the directory in which the driver connects first on every worker's import path: a user's own
    ``pipelines.py`` or ``actors/`` there would hide ours in the workers, though not in the driver.
    """
    former = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)
