"""One code path for every device: a step away from the host gives the host's bits, and no tensor strays."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from in_process_pools import InProcessPools, reference_weights
from mini_world import STAGES, mini_recipe

from actors.group import group_backend
from actors.pool import rank_of
from actors.pool_actor import make_worker
from actors.worker import Rank
from omni_ray.config.recipe import Recipe
from omni_ray.training.networks import POOLS
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.errors import ResourceError

STAGE = STAGES[2] | {"steps": 2, "trainable": [*STAGES[2]["trainable"], "audio"]}

SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    sys.path.insert(0, sys.argv[2])
    import second_device, torch
    from in_process_pools import InProcessPools
    from mini_world import mini_recipe
    from omni_ray.training.networks import POOLS
    from omni_ray.training.prepare import StepBuilder
    from test_devices import STAGE, far_apart

    held = second_device.register()
    base, ranks = Path(sys.argv[1]), int(sys.argv[3])
    sizes = {name: {"actors": ranks, "recompute": "full"} for name in POOLS}
    recipe = mini_recipe(base, stages=[STAGE], pools=sizes, schedule={"num_chunks": ranks})
    prepared = [StepBuilder(recipe, base / "world").build(step) for step in range(recipe.total_steps)]
    pools = InProcessPools(recipe, device=second_device.NAME)
    apart = far_apart(pools, prepared, recipe, base / "saved")
    wanted = pools.weights()
    for name in POOLS:
        pools.all(name, "rewind", 1)
    loaded = InProcessPools(recipe, device=second_device.NAME, folder=base / "saved")
    wrong = 0
    for again in (pools, loaded):  # the second step once more: from the snapshot, and from the checkpoint
        again.step(prepared[1])
        found = again.weights()
        wrong += sum(not torch.equal(found[name], wanted[name]) for name in wanted)
    stray = 0
    for name, actors in pools.pools.items():
        for actor in actors:
            tensors = [*actor.worker.network.parameters(), *actor.worker.network.buffers()]
            if name in POOLS:
                tensors += [x for state in actor.worker.optimizer._adam.state.values() for x in state.values()]
            stray += sum(tensor.device.type != second_device.NAME for tensor in tensors)
    try:
        pools.pools["vision"][0].worker.network.projector.proj(torch.ones(3, 128))
        refused = 0
    except RuntimeError as problem:
        refused = int("expected all of them on one device" in str(problem))
    close = int(apart < 1e-3)
    print(f"RESULT close={close} wrong={wrong} stray={stray} refused={refused} {dict(second_device.crossings)} {apart}")
    """
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_on_another_device_is_the_reference_step(base: Path, ranks: int) -> None:
    """Steps, snapshots, checkpoints and their loading; ``tests/second_device.py`` refuses operations that mix.

    The two go through other kernels (grouped products, attention), so the weights are close and not equal.
    """
    here = Path(__file__).resolve()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(here.parents[2]), str(ranks)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = next((text for text in found.stdout.splitlines() if text.startswith("RESULT")), found.stderr[-3000:])
    assert line.startswith("RESULT close=1 wrong=0 stray=0 refused=1 "), line


def test_who_computes_where(base: Path) -> None:
    recipe = mini_recipe(base, pools={"vision": {"resources": {"gpu": 0.5}}})
    assert rank_of(recipe, "vision", 0) == Rank(pool="vision", device="cuda")
    assert rank_of(recipe, "language", 0) == Rank(pool="language")
    host, cuda = torch.device("cpu"), torch.device("cuda")
    backends = [group_backend(device, gpu) for device, gpu in ((host, 0.0), (cuda, 0.5), (cuda, 1.0))]
    assert backends == ["gloo", "gloo", "nccl"], "nccl refuses two ranks on one GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("pool", [*POOLS, "speech"])
def test_a_gpu_that_is_not_there_is_refused_by_name(base: Path, pool: str) -> None:
    worker = make_worker(mini_recipe(base), Rank(pool=pool, device="cuda"))
    named = rf"pool {pool}, rank 0 asks for a GPU; this node has none .*: set pools.{pool}.resources.gpu to 0, or"
    with pytest.raises(ResourceError, match=named):
        worker.build()


def far_apart(pools: InProcessPools, prepared: list[PreparedStep], recipe: Recipe, saved: Path) -> float:
    """Train; keep a snapshot and a checkpoint after the first step.

    Returns:
        Relative distance of the weights from those of the single process on the host.
    """
    oracle = Reference(recipe)
    for number, step in enumerate(prepared, start=1):
        wanted = oracle.step(step).norm
        norm, made = pools.step(step)
        assert made
        assert norm == pytest.approx(wanted, rel=1e-2)
        for name in POOLS if number == 1 else ():
            pools.all(name, "keep_snapshot", number)
            pools.all(name, "save", saved)
    pools.pools["speech"][0].invoke("save", saved)
    ours, theirs = pools.weights(), reference_weights(oracle)
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    size = sum(float(value.double().square().sum()) for value in theirs.values())
    return float((apart / size) ** 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_on_a_gpu_comes_close_to_the_reference(base: Path, tmp_path: Path, precision: str, ranks: int) -> None:
    """Other kernels, other roundings; AdamW's first steps go by a gradient's sign, so a tiny one shows at full rate."""
    sizes = {name: {"actors": ranks, "precision": precision} for name in POOLS}
    recipe = mini_recipe(base, stages=[STAGE], pools=sizes)
    prepared = [StepBuilder(recipe, base / "world").build(step) for step in range(recipe.total_steps)]
    assert far_apart(InProcessPools(recipe, device="cuda"), prepared, recipe, tmp_path) < 2e-3
