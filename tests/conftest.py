"""Fixtures for all tests: one Ray cluster a session, one torch thread."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Equality tests compare bits, and a sum's bits depend on the number of threads that made it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, by name, what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Hold torch to one thread where a test has imported it; tests that need no torch do not pay for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster with 16 logical CPUs (pools and served replicas at once); ended with the session.

    Code under test that opens its own ``RaySession`` joins this one. Mark users ``@pytest.mark.ray``.
    """
    from actors.cluster import RaySession

    with RaySession(num_cpus=16):
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of untrained tiny networks; read it, do not change it."""
    from tiny_checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``world`` (a few made-up samples of every modality) and ``components`` (untrained networks).

    A module that writes into it has one of its own.
    """
    from mini_world import write_components, write_world

    folder = tmp_path_factory.mktemp("mini")
    (folder / "world").mkdir()
    write_world(folder / "world")
    write_components(folder / "components")
    return folder
