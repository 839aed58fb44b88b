"""A real run from a folder that has its own ``pipelines.py``: the driver and Ray's workers use this distribution."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.slow
def test_train_from_a_folder_with_its_own_modules(tmp_path: Path) -> None:
    from mini_world import STAGES, mini_recipe, write_components, write_world

    from omni_ray.config.load import save_recipe

    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    write_components(tmp_path / "components")
    save_recipe(mini_recipe(tmp_path, stages=[STAGES[0], STAGES[2] | {"steps": 1}]), tmp_path / "mini.yaml")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("pipelines", "actors", "omni_ray", "clusters"):
        (work / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    script = Path(sysconfig.get_path("scripts")) / "omni-ray"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [script, "train", "../mini.yaml", "--out", "run", "--json"],  # relative paths mean the user's folder
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["step"], document["finished"]) == (3, True)
    assert (work / "run" / "metrics.jsonl").is_file()
    assert Path(document["checkpoint"]).parent == work / "run" / "checkpoints"
