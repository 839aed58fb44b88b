"""Benches: every name of the house's targets, each in a module of its own; those not built yet refuse by name.

A bench ``some-name`` is the module ``pipelines/bench/some_name.py`` with ``run(*, quick: bool, seed: int) ->
BenchReport``. ``quick`` cuts repeats only, never load, sizes or kinds. One that measures a trained model takes
``checkpoint: Path | None`` as well.
"""

from __future__ import annotations

import difflib
import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from omni_ray.types.errors import ConfigError, NotYetError

if TYPE_CHECKING:
    from pipelines.bench.writer import BenchReport

BENCHES: dict[str, str] = {
    "language-train": "tokens per second of the language model's forward and backward",
    "language-decode": "tokens per second of generation, one stream and sixteen",
    "vision-encode": "packed against padded pictures",
    "audio-encode": "packed against padded utterances",
    "moe-gemm": "grouped matrix products over expert-parallel sizes",
    "resume": "random interruptions of the data order",
    "data": "samples per second through Ray Data over a plain loader",
    "codec": "compute seconds per second of audio, and words understood",
    "exact": "all plans against the single-process reference, bit for bit",
    "bridge": "any N:M route, memory over chunks, bandwidth",
    "overlap": "the pipelined step over the barrier step",
    "text-parity": "throughput with media over text only",
    "balance": "items over encoder ranks",
    "recovery": "kills of any actor at any phase",
    "control-plane": "the driver's share of a step",
    "serve": "time to first audio, load, stops and refusals",
    "chaos": "sessions under random failures",
    "curriculum": "the full tiny curriculum",
    "simulate": "predicted over measured steps",
    "suite": "minutes of make test",
}
"""Name -> what it measures."""


def bench_module(name: str) -> str:
    """The module that a bench lives in."""
    return f"pipelines.bench.{name.replace('-', '_')}"


def built_benches() -> list[str]:
    """Names whose module exists in this version."""
    return [name for name in BENCHES if find_spec(bench_module(name)) is not None]


def run_bench(name: str, *, quick: bool = False, seed: int = 0, checkpoint: Path | None = None) -> BenchReport:
    """Run one bench.

    Raises:
        ConfigError: an unknown name, with the nearest known one; a checkpoint for a bench that measures none.
        NotYetError: a known bench that this version does not have.
    """
    if name not in BENCHES:
        nearest = difflib.get_close_matches(name, BENCHES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no bench {name!r}; the nearest is {nearest!r} (known: {', '.join(BENCHES)})")
    if name not in built_benches():
        raise NotYetError(f"bench {name!r} ({BENCHES[name]})", f"built so far: {', '.join(built_benches()) or 'none'}")
    run = import_module(bench_module(name)).run
    if checkpoint is not None and "checkpoint" not in inspect.signature(run).parameters:
        raise ConfigError(f"bench {name!r} measures no checkpoint; leave --checkpoint out")
    further = {} if checkpoint is None else {"checkpoint": checkpoint}
    report: BenchReport = run(quick=quick, seed=seed, **further)
    return report
