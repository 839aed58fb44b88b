"""The data position in a checkpoint: where the order stands, and what must be the same for it to mean anything.

The record holds the state of the order and its guarantees: seed, stages, packing, and the fingerprint of every source.
Readers, ranks and prefetch depth are not among them: they may change. What differs is refused by name; a changed
mixture may be accepted, because counters go by stream: the new weights go on where the old ones stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from omni_ray.data.order_state import OrderState
from omni_ray.data.planner import StageOrder
from omni_ray.training.prepare import StepBuilder
from omni_ray.types.errors import CheckpointError


def position_record(state: OrderState, rests_on: Mapping[str, Any]) -> dict[str, Any]:
    """A state and its :func:`guarantees` as plain JSON, for a checkpoint."""
    return state.to_record() | {"guarantees": dict(rests_on)}


def guarantees(builder: StepBuilder) -> dict[str, Any]:
    """What the position rests on."""
    return {
        "seed": builder.recipe.seed,
        "stages": [_stage(stage) for stage in builder.stages],
        "sources": {name: [len(source), source.fingerprint] for name, source in builder.sources.items()},
    }


def resumed_state(builder: StepBuilder, record: Mapping[str, Any], accept: Sequence[str] = ()) -> OrderState:
    """The state of a record, where everything it rests on still holds.

    Args:
        builder: Of the recipe that goes on.  record: :func:`position_record` of the checkpoint.
        accept: What may differ: ``mixture``.
    Raises:
        CheckpointError: names what differs, both values and the mend.
    """
    state = OrderState.from_record(record)
    try:
        before = record["guarantees"]
        _check_value("seed", before["seed"], builder.recipe.seed)
        _check_sources(builder, before["sources"])
        _check_stages(builder.stages, before["stages"], accept)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the data position has no {error}; take a checkpoint of this program") from error
    return state


def _check_sources(builder: StepBuilder, before: Mapping[str, Sequence[Any]]) -> None:
    for name, source in builder.sources.items():
        if name not in before:
            continue
        count, fingerprint = before[name]
        if source.fingerprint != fingerprint:
            raise CheckpointError(
                f"source {name!r} has changed since the checkpoint: {count} samples, fingerprint {fingerprint} then; "
                f"{len(source)}, {source.fingerprint} now. Its numbers would name other samples: restore its shards, "
                "or start in another --out (new data goes into a source of its own)"
            )


def _check_stages(stages: Sequence[StageOrder], before: Sequence[Mapping[str, Any]], accept: Sequence[str]) -> None:
    if len(before) != len(stages):
        raise CheckpointError(
            f"the checkpoint's curriculum has {len(before)} stages, this one {len(stages)}; restore the recipe"
        )
    for old, stage in zip(before, stages, strict=True):
        for key, now in _stage(stage).items():
            if key == "mixture" and old[key] != now:
                if "mixture" not in accept:
                    raise CheckpointError(
                        f"the mixture of stage {stage.name} has changed since the checkpoint; restore it, or go on "
                        "with the new one by checkpoint.accept_changed=[mixture] (no sample is repeated or lost)"
                    )
            else:
                _check_value(f"stages.{stage.name}.{key}", old[key], now)


def _check_value(name: str, before: Any, now: Any) -> None:
    if before != now:
        raise CheckpointError(
            f"{name} is {now!r}, yet the checkpoint's order of samples was made with {before!r}; set it back: the "
            "global batch must stay the same (readers, ranks and prefetch depth may change)"
        )


def _stage(stage: StageOrder) -> dict[str, Any]:
    mixture = json.dumps(stage.mixture.model_dump(mode="json", exclude={"gap"}), sort_keys=True)
    packing = stage.packing.kind
    return {
        "name": stage.name,
        "steps": stage.steps,
        "packing": packing,
        "lookahead": stage.packing.lookahead if packing == "best_fit" else 0,
        "sequences": stage.sequences,
        "rows": stage.rows,
        "mixture": hashlib.sha256(mixture.encode()).hexdigest()[:16],
    }
