"""A hundred times the data, the same peak: what a reader holds does not grow with what lies on the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from source_files import tar_bytes

from omni_ray.data.image import encode_png
from omni_ray.data.tokenizer import Tokenizer

_CHILD = """
import sys
from pathlib import Path
from omni_ray.config.load import check_recipe
from omni_ray.training.prepare import StepBuilder
root = Path(sys.argv[1])
stage = {"name": "S", "steps": 50, "mixture": {"picture": 30}, "trainable": ["language"], "seq_len": 512}
data = {"root": str(root), "sources": {"picture": {"path": "{data}/picture"}}, "cache_bytes": int(sys.argv[2])}
builder = StepBuilder(check_recipe({"size": "tiny", "stages": [stage], "data": data}), root)
for step in range(50):
    builder.build(step)
# ru_maxrss would begin at the peak of the process that started this one.
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(fields["VmHWM"].split()[0])
"""

_CHILD_RAY = """
import os, sys
from pathlib import Path
import ray
from actors.cluster import RaySession
from actors.feeder import Feeder
from omni_ray.config.load import check_recipe

def own_kib(pid):
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))  # the object store is bounded itself

class Watched(Feeder):
    def pid(self):
        return os.getpid()

root = Path(sys.argv[1])
stage = {"name": "S", "steps": 60, "mixture": {"picture": 30}, "trainable": ["language"], "seq_len": 512}
data = {"root": str(root), "sources": {"picture": {"path": "{data}/picture"}}, "cache_bytes": int(sys.argv[2])}
data |= {"workers": 1}
recipe = check_recipe({"size": "tiny", "stages": [stage], "data": data})
peak = 0
with RaySession(num_cpus=3):
    feeder = ray.remote(Watched).options(num_cpus=0.1).remote(recipe, root, 0)
    pids = [os.getpid(), ray.get(feeder.pid.remote())]
    for step in range(50):
        plan, _ = ray.get(feeder.plan.remote(step))
        keys = [("rows", batch.index, 0) for batch in plan.micro_batches]
        keys += sorted({(i.modality.value, i.micro_batch, i.encoder_rank) for i in plan.items})
        ray.get(feeder.payloads.remote(step, keys))
        workers = {ray.get(feeder.prepared_by.remote(step))}
        feeder.forget.remote(step)
        peak = max(peak, sum(map(own_kib, {*pids, *workers})))
    ray.kill(feeder)
print(peak)
"""


def _world(root: Path, samples: int) -> Path:
    (root / "picture").mkdir(parents=True)
    Tokenizer.learn(["USER: ASSISTANT: a picture"] * 3).save(root / "tokenizer.json")
    rng = np.random.default_rng(0)
    pictures = [encode_png(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(5)]
    for shard in range(-(-samples // 100)):
        numbers = range(shard * 100, min(samples, shard * 100 + 100))
        members = [m for n in numbers for m in ((f"{n:06d}.png", pictures[n % 5]), (f"{n:06d}.txt", b"a picture"))]
        (root / "picture" / f"train-{shard:05d}.tar").write_bytes(tar_bytes(members))
    return root


def _peak_kib(root: Path, cache_bytes: int, child: str = _CHILD) -> int:
    words = [sys.executable, "-c", child, str(root), str(cache_bytes)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.full
def test_a_hundred_times_the_data_takes_the_same_memory(tmp_path: Path) -> None:
    little, much = _world(tmp_path / "little", 15), _world(tmp_path / "much", 1500)
    small = _peak_kib(little, 4_000_000)
    large = _peak_kib(much, 4_000_000)
    assert large == pytest.approx(small, rel=0.1)
    assert _peak_kib(much, 2**30) > 1.15 * small, "were every sample kept, it would show"


@pytest.mark.full
@pytest.mark.ray
def test_driver_feeder_and_decode_worker_take_the_same_memory_of_a_hundred_times_the_data(tmp_path: Path) -> None:
    little, much = _world(tmp_path / "little", 15), _world(tmp_path / "much", 1500)
    small = _peak_kib(little, 4_000_000, _CHILD_RAY)
    large = _peak_kib(much, 4_000_000, _CHILD_RAY)
    assert large == pytest.approx(small, rel=0.1)
    assert _peak_kib(much, 2**30, _CHILD_RAY) > 1.1 * small, "were every sample kept, it would show"
