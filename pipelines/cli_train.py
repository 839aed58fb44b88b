"""Handlers of ``quickstart``, ``train``, ``plan``, ``simulate`` and ``submit``."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from omni_ray.types.errors import NotYetError
from pipelines.cli_outcome import Outcome, real_data_folder


def quickstart(args: Namespace) -> Outcome:
    """The whole path on real input; writes ``report.json`` and one page into ``--out``."""
    real_data = real_data_folder()
    from pipelines.quickstart import quickstart as run_quickstart
    from pipelines.quickstart import summary

    out = args.out.resolve()
    report = run_quickstart(
        out,
        recipe=args.recipe,
        components=_components(args.components),
        components_scale=args.components_scale,
        real_data=real_data,
        seed=args.seed,
        overrides=args.set,
    )
    return Outcome(text=summary(report, out), document=report)


def _components(named: str) -> str:
    return named if named in ("shipped", "train") else str(Path(named).resolve())


def train(args: Namespace) -> Outcome:
    """Train a recipe; a stop signal checkpoints and ends with exit code 1, because the recipe is not done."""
    from omni_ray.config.load import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    out = (args.out or Path("runs") / Path(args.recipe).stem).resolve()
    from omni_ray.training.realised import realised_text
    from pipelines.training.loop import train as run_training
    from pipelines.training.timeline import usage_text

    looked_at: dict[str, Any] = {}
    if args.live_port is not None:
        from pipelines.serving.live.actor import LiveActor
        from pipelines.serving.live.view import LiveView

        looked_at = {"actor": LiveActor, "onlooker": LiveView(args.live_port)}
    result = run_training(recipe, out, args.resume, timeline=args.timeline, **looked_at)
    if result.finished:
        text = f"trained {result.step} steps in {result.seconds:.0f} s; checkpoint {result.checkpoint}"
        text += f"\n{usage_text(result.usage)}" if result.usage else ""
        text += f"\n{realised_text(result.data, result.bad_samples)}" if result.data else ""
    else:
        text = f"stopped after step {result.step} of {recipe.total_steps}; the same command with --resume goes on"
    return Outcome(text=text, document=dataclasses.asdict(result))


def plan(args: Namespace) -> Outcome:
    """Step plans as the driver would make them, one JSON document or one line a micro-batch."""
    from omni_ray.config.load import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    from pipelines.training.loop import plan as plan_steps

    plans = plan_steps(recipe, args.steps)
    lines = []
    for step in plans:
        lines.append(f"step {step.step} stage {step.stage}: {len(step.items)} items, counts {dict(step.counts)}")
        lines.extend(
            f"  micro-batch {batch.index} -> language {batch.language_rank}: "
            f"{len(batch.samples)} samples, {sum(batch.lengths)} rows"
            for batch in step.micro_batches
        )
        lines.extend(
            f"  item {item.id} {item.modality}: rank {item.encoder_rank} -> language {item.language_rank}, "
            f"micro-batch {item.micro_batch} rows {item.offset}..{item.offset + item.length - 1}, cost {item.cost:g}"
            for item in step.items
        )
    return Outcome(text="\n".join(lines), document=[json.loads(step.to_json()) for step in plans])


def simulate(args: Namespace) -> Outcome:
    """Refused by name; the recipe is checked first, so that its own faults show."""
    from omni_ray.config.load import load_recipe

    load_recipe(args.recipe, args.set)
    raise NotYetError("simulate (predicted step time and memory)", "omni-ray plan shows the plan of a real step")


def submit(args: Namespace) -> Outcome:
    """Refused by name; the recipe is checked first, so that its own faults show."""
    from omni_ray.config.load import load_recipe

    load_recipe(args.recipe, args.set)
    where = args.address or os.environ.get("RAY_ADDRESS") or "the cluster"
    raise NotYetError(
        f"submit (sending a recipe to {where} as a job)",
        "run omni-ray train on the head node, or set RAY_ADDRESS to train on a running cluster from here",
    )
