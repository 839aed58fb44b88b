"""Where the time of a run went: spans of every actor as one timeline, and shares per pool."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import ray

from actors.pool import Pool
from omni_ray.observability.spans import Span, SpanTotal, process_recorder, write_chrome_trace

SETTING_UP = frozenset({"build", "load", "set_stage", "adopt"})
TRANSFER = "bridge."
SHORTEST_WAIT_S = 1e-4


def shares(totals: Mapping[str, SpanTotal], wall_s: float) -> dict[str, float]:
    """Busy, transfer and waiting share of one actor.

    Args:
        totals: Its spans by name.  wall_s: How long the steps took.
    """
    busy = sum(t.seconds for name, t in totals.items() if name not in SETTING_UP and not name.startswith(TRANSFER))
    transfer = sum(total.seconds for name, total in totals.items() if name.startswith(TRANSFER))
    wall_s = max(wall_s, busy + transfer, 1e-9)
    return {"busy": busy / wall_s, "transfer": transfer / wall_s, "waiting": 1.0 - (busy + transfer) / wall_s}


def usage(pools: Mapping[str, Pool], wall_s: float) -> dict[str, dict[str, float]]:
    """Mean shares of every pool's ranks."""
    out = {}
    for name, pool in pools.items():
        ranks = [shares(totals, wall_s) for _, totals in ray.get([actor.spans.remote() for actor in pool.actors])]
        out[name] = {key: sum(rank[key] for rank in ranks) / len(ranks) for key in ("busy", "transfer", "waiting")}
    return out


def usage_text(found: Mapping[str, Mapping[str, float]]) -> str:
    """One line a pool."""
    return "\n".join(
        f"  {name:9} busy {100 * s['busy']:5.1f} %  transfer {100 * s['transfer']:5.1f} %  "
        f"waiting {100 * s['waiting']:5.1f} %"
        for name, s in found.items()
    )


def write_timeline(pools: Mapping[str, Pool], path: Path) -> None:
    """Write the newest spans of all actors and of the driver for Perfetto; gaps between an actor's spans are waits."""
    by_process: dict[str, tuple[Span, ...]] = {"driver": process_recorder().spans()}
    for name, pool in pools.items():
        answers = ray.get([actor.spans.remote() for actor in pool.actors])
        by_process |= {f"{name}-{rank}": with_waits(spans) for rank, (spans, _) in enumerate(answers)}
    write_chrome_trace(path, by_process)


def with_waits(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Spans with a ``wait`` in every gap between two outermost ones."""
    outer = sorted((span for span in spans if span.depth == 0), key=lambda span: span.start_s)
    waits = []
    for before, after in pairwise(outer):
        end = before.start_s + before.seconds
        if after.start_s - end > SHORTEST_WAIT_S:
            gap = after.start_s - end
            waits.append(Span(name="wait", start_s=end, seconds=gap, depth=0, thread=after.thread, fields={}))
    return (*spans, *waits)
