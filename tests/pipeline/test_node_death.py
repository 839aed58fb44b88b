"""A run waits for a node that is still to come, and outlives its death: the next one takes its pools, the bits stay."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = textwrap.dedent(
    """
    import secrets, sys, threading, time, os
    from pathlib import Path

    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    sys.path.insert(0, sys.argv[2])
    import ray, torch
    from mini_world import STAGES, mini_recipe, write_components, write_world
    from ray.cluster_utils import Cluster
    from omni_ray.observability.events import EventLog, event_log_to
    from omni_ray.training.prepare import StepBuilder
    from omni_ray.training.reference import Reference
    from safetensors.torch import load_file
    from pipelines.training.loop import train

    base = Path(sys.argv[1])
    (base / "world").mkdir()
    write_world(base / "world")
    write_components(base / "components")
    second = {"resources": {"cpu": 1, "custom": {"second": 1}}}
    recipe = mini_recipe(
        base,
        stages=[STAGES[2] | {"steps": 40}],
        pools={"vision": second, "audio": second, "wait_s": 60},
        checkpoint={"every_steps": 100, "snapshot_every": 3},
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)

    results = []

    def run():
        with event_log_to(EventLog(jsonl=base / "events.jsonl")):
            results.append(train(recipe, base / "run", quiet=True))

    def await_text(path, text, times=1):
        while (not path.is_file() or path.read_text().count(text) < times) and runner.is_alive():
            time.sleep(0.05)

    runner = threading.Thread(target=run)  # nodes are started by the main thread alone
    runner.start()
    await_text(base / "events.jsonl", "waiting_for_cluster")
    doomed = cluster.add_node(num_cpus=4, resources={"second": 4})
    await_text(base / "run" / "metrics.jsonl", "\\n", 8)
    cluster.remove_node(doomed, allow_graceful=False)
    cluster.add_node(num_cpus=4, resources={"second": 4})
    runner.join()
    result = results[0]
    builder, oracle = StepBuilder(recipe, base / "world"), Reference(recipe)
    for step in range(recipe.total_steps):
        oracle.step(builder.build(step))
    wrong = 0
    for name in ("language", "vision", "audio"):
        oracle.networks[name].save_pretrained(base / "reference" / name)
        for path in (base / "reference" / name).glob("*.safetensors"):
            ours = load_file(result.checkpoint / "model" / name / path.name)
            wrong += sum(not torch.equal(ours[key], value) for key, value in load_file(path).items())
    print(f"RESULT recoveries={result.recoveries} finished={result.finished} wrong={wrong}")
    ray.shutdown()
    cluster.shutdown()
    """
)


@pytest.mark.ray
@pytest.mark.full
def test_a_node_that_dies_takes_nothing_with_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    tests = str(Path(__file__).resolve().parent.parent)
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path), tests],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    line = next((text for text in found.stdout.splitlines() if text.startswith("RESULT")), found.stderr[-3000:])
    assert line.startswith("RESULT")
    assert "finished=True wrong=0" in line
    assert "recoveries=1 " in line, "the node took actors of two pools with it, and they came back at once"
