"""Serving: paced clients in a process of their own against a real server on this machine, tiny size, untrained.

The arithmetic is that of a trained checkpoint; answers never end by themselves, so their length is asked for.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.bench.serve_inside import batch, hearing, rollbacks
from pipelines.bench.serve_material import write_checkpoint
from pipelines.bench.writer import BenchReport, Figure, counted, environment, measured

MOST_SESSIONS = 8
ROWS = 25
"""Rows of an answer: 1.5 s of sound."""
OFF = {"speculation": False, "streaming_prefill": False}


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """All figures of the serving rows.

    Args:
        quick: Fewer turns, interrupts and rollbacks, and one minute of load instead of ten.
        seed: Other words and pauses.
    """
    from pipelines.serving.app import serve

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), {"limits": {"max_sessions": MOST_SESSIONS}})
        inside = rollbacks(checkpoint, 100 if quick else 1000, seed)
        heard = [hearing(checkpoint, MOST_SESSIONS, 12) for _ in range(5)]
        pairs = [(batch(checkpoint, 16, 40), batch(checkpoint, 1, 40)) for _ in range(5)]
        with serve(checkpoint, port=0, block=False) as served:
            live = _live(served.url, quick, seed)
            hops_ms = _hops(60 if quick else 300)
    figures = [*_answer_figures(live), *_load_figures(live), *_edge_figures(live, hops_ms), *_inside_figures(inside)]
    ratios = [together / alone for together, alone in pairs]
    against = "rows/s of 16 sessions in one batch over one session"
    figures.append(measured("batch16_over_single", ratios, unit="ratio", better="higher", goal=6.0, against=against))
    ratios = [together / alone for together, alone in heard]
    against = "packets/s of 8 sessions through the audio encoder together over one by one"
    figures.append(measured("hear8_together_over_alone", ratios, unit="ratio", better="higher", against=against))
    return BenchReport(bench="serve", figures=tuple(figures), environment=environment(seed=seed, quick=quick))


def _live(url: str, quick: bool, seed: int) -> dict[str, Any]:
    """What the clients saw, by part of the bench."""
    turns = 8 if quick else 30
    seen: dict[str, Any] = {"warm": _clients(url, kind="turns", turns=2, speech_s=1.0, seed=seed)}
    seen["single"] = _clients(url, kind="turns", turns=turns, speech_s=2.0, seed=seed)
    seen["on"], seen["off"] = [], []
    for pair in range(2 if quick else 6):
        for side, omni in (("on", {}), ("off", OFF)):
            seen[side] += _clients(url, kind="turns", turns=1, speech_s=10.0, omni=omni, seed=seed + pair)
    # The short turns' own words behind 56 s of others (a turn ends after 60 s), so that both sides end alike for the
    # detector of speech.
    seen["long"] = _clients(url, kind="turns", turns=3 if quick else 8, speech_s=2.0, lead_s=56.0, seed=seed)
    load_s = 40.0 if quick else 600.0
    seen["load"] = _clients(
        url, kind="turns", turns=1000, for_s=load_s, speech_s=2.0, clients=MOST_SESSIONS, stagger_s=0.7, seed=seed
    )
    seen["stops"] = _clients(url, kind="interrupts", turns=40 if quick else 500, rows=300, seed=seed)
    seen["refusals"] = _clients(url, kind="refusals", fill=MOST_SESSIONS, turns=10 if quick else 50)
    return seen


def _clients(url: str, **plan: Any) -> Any:
    plan = {"rows": ROWS, **plan, "url": url.replace("http", "ws", 1) + "/v1/realtime"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.bench.serve_clients"],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _answer_figures(live: dict[str, Any]) -> list[Figure]:
    single, on, off, long = (_all(live[name], "first_audio_ms") for name in ("single", "on", "off", "long"))
    detected = _all(live["single"], "after_detected_ms")
    clock = "end of the recorded speech + 600 ms leaving the client"
    return [
        _point("first_audio_p95_ms", single, 0.95, goal=100.0, against=clock),
        _point("first_audio_p50_ms", single, 0.50, goal=50.0, against=clock),
        _point("after_detected_p50_ms", detected, 0.50, against="the server's own end of speech + 600 ms"),
        _ratio("overlap_ratio", _middle(on), _middle(off), goal=0.10, n=len(on), against="both off"),
        _point("off_first_audio_p50_ms", off, 0.50, against="10 s turns, speculation and streaming prefill off"),
        _long_over_short(long, single[: len(long)]),
        counted("early_sounds", sum(seen["early"] for seen in live["single"] + live["load"]), n=len(single)),
    ]


def _long_over_short(long: Sequence[float], short: Sequence[float]) -> Figure:
    """Of means: as a turn's end falls inside a 20 ms piece or behind it, first sound takes 3 ms or 22, in half each.

    A median would stand at one or the other by chance.
    """
    top, bottom = statistics.fmean(long), statistics.fmean(short)
    against = "means of 58 s over 2 s, which end in the same words"
    return _ratio("long_turn_ratio", top, bottom, goal=1.2, n=len(long), against=against)


def _load_figures(live: dict[str, Any]) -> list[Figure]:
    loaded, single = _all(live["load"], "first_audio_ms"), _all(live["single"], "first_audio_ms")
    turns = sum(seen["turns"] for seen in live["load"])
    errors = sum(len(seen["errors"]) for part in ("single", "on", "off", "long", "load") for seen in live[part])
    p95 = "p95 first audio of 8 conversations over one"
    return [
        _ratio("load8_ratio", _at(loaded, 0.95), _at(single, 0.95), goal=2.0, n=len(loaded), against=p95),
        counted("underruns", sum(seen["underruns"] for seen in live["load"]), n=turns),
        counted("errors", errors, n=turns),
    ]


def _edge_figures(live: dict[str, Any], hops_ms: Sequence[float]) -> list[Figure]:
    stops = _all(live["stops"], "after_cancel_ms")
    loose = sum(seen["unpunctuated"] for seen in live["stops"])
    return [
        _point("stop_p99_ms", stops, 0.99, goal=60.0, against="sound received after response.cancel was sent"),
        counted("histories_without_punctuation", loose, n=len(stops)),
        _point("hop_p50_ms", hops_ms, 0.50, goal=3.0, against="an empty call through a deployment handle"),
        _point("refusal_ms", live["refusals"], 1.0, goal=50.0, against="connection begun to reason received; worst"),
    ]


def _inside_figures(inside: dict[str, Any]) -> list[Figure]:
    n, oracle = inside["forced"], "whole sound encoded and prefilled by the single process"
    return [
        counted("rollback_mismatches", inside["mismatches"], n=n, against=oracle),
        _point("rollback_p99_ms", inside["cuts_ms"], 0.99, goal=5.0, against="the cut of the cache"),
        counted("reprefilled_packets_max", inside["again"], n=n, goal=1),
        counted("sessions_left", inside["left"], n=inside["turns"]),
    ]


def _hops(count: int) -> list[float]:
    """Empty calls to a stage, one after another, on the way that a session's calls take."""
    from ray import serve as ray_serve

    from pipelines.serving.serve_stages import bound

    ready = bound(ray_serve.get_deployment_handle("vision", "omni-ray"), "ready", direct=True)
    times = []
    for _ in range(count + 10):
        began = time.perf_counter()
        ready.remote().result()
        times.append(1000 * (time.perf_counter() - began))
    return times[10:]


def _all(seen: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [value for one in seen for value in one[name]]


def _at(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, the nearest one above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def _middle(values: Sequence[float]) -> float:
    return _at(values, 0.5)


def _point(name: str, values: Sequence[float], share: float, *, goal: float | None = None, against: str = "") -> Figure:
    return Figure(
        name=name,
        value=_at(values, share),
        unit="ms",
        better="lower",
        goal=goal,
        against=against,
        n=len(values),
        runs=tuple(values),
    )


def _ratio(name: str, top: float, bottom: float, *, goal: float, n: int, against: str) -> Figure:
    return Figure(
        name=name, value=top / bottom, unit="ratio", better="lower", goal=goal, against=against, n=n, runs=(top, bottom)
    )
