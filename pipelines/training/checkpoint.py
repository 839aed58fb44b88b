"""Checkpoints of a run: one directory for all pools and the data position, and who may write it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.pool import Pool
from omni_ray.checkpoint import store
from omni_ray.config.load import save_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.data.order_state import OrderState
from omni_ray.observability.events import emit
from omni_ray.training.data_position import guarantees, resumed_state
from omni_ray.training.prepare import StepBuilder
from omni_ray.types.errors import CheckpointError
from pipelines.training.data_root import data_fingerprint, data_root

ORDER_KEYS = ("mixture", "packing", "micro_batches", "seq_len", "steps")
"""Keys of a stage that the data position compares by itself, with a sentence for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a run begins."""

    step: int
    """First step to run."""
    checkpoint: Path | None
    """Folder to load, or None to start from the recipe."""
    guarantees: Mapping[str, Any]
    """What the data position rests on; goes into every checkpoint of the run."""
    order: OrderState | None = None
    """Data position to go on from."""


def resume_point(recipe: Recipe, out: Path, resume: bool) -> ResumePoint:
    """Find the newest whole checkpoint of ``out`` and check that it belongs to this recipe.

    Raises:
        CheckpointError: ``out`` holds checkpoints and ``resume`` is False, or they come from another recipe or data.
    """
    newest = store.newest(out / "checkpoints")
    if newest is None:
        return ResumePoint(step=0, checkpoint=None, guarantees=guarantees(StepBuilder(recipe, data_root(recipe))))
    if not resume:
        raise CheckpointError(
            f"{out} already holds {newest.name}; add --resume to continue it, or choose another --out"
        )
    state, root = store.read_state(newest), data_root(recipe)
    builder, accepted = StepBuilder(recipe, root), recipe.checkpoint.accept_changed
    order: OrderState | None = None
    # Where only the order can differ, the position says by name what does; anything else is another run altogether.
    if state.get("recipe_but_order") == recipe.numbers_fingerprint(without=ORDER_KEYS):
        order = resumed_state(builder, state["order"], accepted)
    mine_recipe = state["recipe"] if order is not None and accepted else recipe.numbers_fingerprint()
    for what, mine in (("recipe", mine_recipe), ("data", data_fingerprint(root))):
        if state[what] != mine:
            raise CheckpointError(
                f"{newest} was made by another {what} (fingerprint {state[what]}, now {mine}); resuming would not "
                f"continue the same run: restore the {what}, or start in another --out"
            )
    return ResumePoint(step=int(state["step"]), checkpoint=newest, guarantees=guarantees(builder), order=order)


def save_checkpoint(
    recipe: Recipe, out: Path, step: int, pools: Mapping[str, Pool], position: Mapping[str, Any]
) -> Path:
    """Write the state after ``step`` steps: weights and optimizer of all pools, data position, recipe, versions.

    Args:
        recipe: The run.  out: Its folder.  step: Steps done.  pools: Whose weights.
        position: Output of ``position_record`` there.

    Raises:
        CheckpointError: it cannot be written; earlier ones stay intact.
    """
    root = data_root(recipe)
    parent = out / "checkpoints"
    with store.writing(parent, step) as folder:
        ray.get([pool.actors[0].invoke.remote("save", folder) for pool in pools.values()])
        save_recipe(recipe, folder / "recipe.yaml")
        (folder / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
        stage = recipe.stage_at(step - 1)[0].name if step else ""
        store.write_state(
            folder,
            {
                "step": step,
                "stage": stage,
                "order": position,
                "seed": recipe.seed,
                "recipe": recipe.numbers_fingerprint(),
                "recipe_but_order": recipe.numbers_fingerprint(without=ORDER_KEYS),
                "data": data_fingerprint(root),
            },
        )
    store.prune(parent, recipe.checkpoint.keep)
    emit("checkpoint", step=step, folder=str(parent / store.checkpoint_name(step)))
    return parent / store.checkpoint_name(step)


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keep a second driver out of the same folder; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"--out {out} cannot be used ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise CheckpointError(f"another run writes {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        os.close(handle)
