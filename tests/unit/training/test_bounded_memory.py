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
import resource, sys
from pathlib import Path
from omni_ray.config.load import check_recipe
from omni_ray.training.prepare import StepBuilder
root = Path(sys.argv[1])
stage = {"name": "S", "steps": 50, "mixture": {"picture": 30}, "trainable": ["language"], "seq_len": 512}
data = {"root": str(root), "sources": {"picture": {"path": "{data}/picture"}}, "cache_bytes": int(sys.argv[2])}
builder = StepBuilder(check_recipe({"size": "tiny", "stages": [stage], "data": data}), root)
for step in range(50):
    builder.build(step)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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


def _peak_kib(root: Path, cache_bytes: int) -> int:
    words = [sys.executable, "-c", _CHILD, str(root), str(cache_bytes)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.full
def test_a_hundred_times_the_data_takes_the_same_memory(tmp_path: Path) -> None:
    little, much = _world(tmp_path / "little", 15), _world(tmp_path / "much", 1500)
    small = _peak_kib(little, 4_000_000)
    large = _peak_kib(much, 4_000_000)
    assert large == pytest.approx(small, rel=0.1)
    assert _peak_kib(much, 2**30) > 1.15 * small, "were every sample kept, it would show"
