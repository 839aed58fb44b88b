"""``offload: cpu``: masters, moments and the optimizer step in host memory, with the bits of the device's own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from in_process_pools import InProcessPools, trained_alone
from mini_world import STAGES, differing, mini_recipe

from omni_ray.training.networks import POOLS
from omni_ray.training.prepare import StepBuilder

STAGE = STAGES[2] | {"steps": 2, "trainable": [*STAGES[2]["trainable"], "audio"]}
SHARDS = {"language": "zero3", "vision": "none", "audio": "zero2"}

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
    from test_offload import SHARDS, STAGE

    held = second_device.register()
    base = Path(sys.argv[1])

    def recipe_of(offload):
        sizes = {name: {"actors": 2, "offload": offload, "shard": SHARDS[name], "recompute": "full"} for name in POOLS}
        sizes["vision"]["precision"] = "bf16"
        return mini_recipe(base, stages=[STAGE], pools=sizes)

    def state(worker):
        optimizer = worker.optimizer
        masters = list(optimizer.masters.values())
        moments = [x for found in optimizer._adam.state.values() for x in found.values()]
        return [*masters, *moments, *(m.grad for m in masters if m.grad is not None), *worker.terms.values(),
                *(piece for pieces in worker.pieces.values() for piece in pieces)]

    def look(pools, seen):
        for name in POOLS:
            for actor in pools.pools[name]:
                seen += [tensor.device.type for tensor in state(actor.worker)]
                network = [*actor.worker.network.parameters(), *actor.worker.network.buffers()]
                assert all(tensor.device.type == second_device.NAME for tensor in network)

    wrong, seen = 0, []
    plain, moved = (InProcessPools(recipe_of(word), device=second_device.NAME) for word in ("none", "cpu"))
    builder = StepBuilder(recipe_of("cpu"), base / "world")
    prepared = [builder.build(step) for step in range(2)]
    moved.after_micro_batch = lambda index: look(moved, seen)
    for step in range(2):
        assert moved.step(prepared[step]) == plain.step(prepared[step])
        look(moved, seen)
        if step == 0:
            moved.save(base / "saved")
            for name in POOLS:
                moved.all(name, "keep_snapshot", 1)
    wanted = plain.weights()
    again = InProcessPools(recipe_of("cpu"), device=second_device.NAME, folder=base / "saved")
    for name in POOLS:
        moved.all(name, "rewind", 1)
    for pools in (moved, again):
        pools.step(prepared[1])
        look(pools, seen)
        found = pools.weights()
        wrong += sum(not torch.equal(found[name], wanted[name]) for name in wanted)
    for name in POOLS:
        facts = moved.all(name, "state_in_host")
        values = sum(wanted[f"{name}/{key}"].numel() for key in moved.pools[name][0].worker.optimizer.parameters)
        assert sum(held for _, held in facts) == values * 12 * (2 if SHARDS[name] == "none" else 1), (name, facts)
        assert facts[0][0] == second_device.NAME
    print(f"RESULT wrong={wrong} tensors={len(seen) > 1000} where={sorted(set(seen))}")
    """
)


def test_nothing_of_the_optimizer_is_on_the_device_and_the_bits_are_equal(base: Path) -> None:
    """Whole and sharded, fp32 and bf16; after steps, a rewind and a checkpoint's loading."""
    here = Path(__file__).resolve()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(here.parents[2])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    line = next((text for text in found.stdout.splitlines() if text.startswith("RESULT")), found.stderr[-3000:])
    assert line == "RESULT wrong=0 tensors=True where=['cpu']"


def test_on_the_host_offload_changes_nothing_and_keeps_no_second_copy(base: Path) -> None:
    recipe = mini_recipe(base, stages=[STAGE], pools={name: {"offload": "cpu"} for name in POOLS})
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    for step in range(recipe.total_steps):
        pools.step(builder.build(step))
    assert differing(pools.weights(), trained_alone(base, recipe)) == []
    for name in POOLS:
        optimizer = pools.pools[name][0].worker.optimizer
        assert all(master is optimizer.parameters[key] for key, master in optimizer.masters.items())
        assert pools.all(name, "state_in_host") == [("cpu", 0)]
