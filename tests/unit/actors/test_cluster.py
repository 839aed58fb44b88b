"""A Ray session: whose modules workers import, what it leaves behind, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from actors.cluster import check_shared_memory, object_store_bytes
from omni_ray.types.errors import ResourceError


def test_too_little_shared_memory_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"MB free, yet the object store needs 1000000000000 MB; enlarge it"):
        check_shared_memory(10**18, tmp_path)
    check_shared_memory(1, tmp_path)
    check_shared_memory(10**18, tmp_path / "not-linux")


@pytest.mark.parametrize("text", ["79", "lots", "-500", "1e3"])
def test_bad_object_store_size_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMNI_RAY_OBJECT_STORE_MB", text)
    with pytest.raises(ResourceError, match=rf"^OMNI_RAY_OBJECT_STORE_MB is '{text}'; it must be a whole number"):
        object_store_bytes()


def test_object_store_size_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_RAY_OBJECT_STORE_MB", "120")
    assert object_store_bytes() == 120_000_000


DRIVER = """
import os
from actors.cluster import RaySession
import ray

@ray.remote
def where():
    import actors, omni_ray, pipelines
    return [os.path.dirname(m.__file__) for m in (actors, omni_ray, pipelines)]

before = {k: v for k, v in os.environ.items() if "AUTH" in k or k == "OMP_NUM_THREADS"}
with RaySession(num_cpus=2) as outer:
    assert outer.owns_connection
    with RaySession() as inner:
        assert not inner.owns_connection
    found = ray.get(where.remote())
assert not ray.is_initialized()
assert before == {k: v for k, v in os.environ.items() if "AUTH" in k or k == "OMP_NUM_THREADS"}
import actors, omni_ray, pipelines
assert found == [os.path.dirname(m.__file__) for m in (actors, omni_ray, pipelines)], found
print("same modules")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_workers_import_this_distribution_from_a_folder_with_its_own_pipelines(tmp_path: Path) -> None:
    """Ray puts the driver's working directory first on the workers' path; a user's ``pipelines.py`` must not win."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    for name in ("pipelines.py", "actors.py", "omni_ray.py"):
        (work / name).write_text("raise RuntimeError('the wrong module')\n")
    script = tmp_path / "scripts" / "driver.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(DRIVER))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=work, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("same modules")
    assert not (home / ".ray" / "auth_token").exists(), "a cluster's secret must not stay in the home folder"


@pytest.mark.ray
def test_fixture_cluster_is_joined_not_restarted(ray_cluster: None) -> None:
    import ray

    from actors.cluster import RaySession

    with RaySession() as session:
        assert not session.owns_connection
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 16
