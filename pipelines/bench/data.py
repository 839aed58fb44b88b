"""Data: samples a second through Ray Data over a plain loader of the same shards, and who waits for data in training.

Our side draws, decodes, writes rows and plans of micro-batches (mix, decode, pack) in Ray Data and gives them out as
the feeder does; the plain side decodes the same frames to the same sizes and collates. Both with as many decoding
workers as there are cores; one process after the other, in turns, each measured after ten seconds of steady running.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from actors.cluster import local_or_joined
from actors.feeder import Feeder
from omni_ray.config.load import load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.training.prepare import PreparedStep, StepBuilder
from pipelines.bench.data_material import CLIPS, SHARDS, SHARES, material_recipe, write_material
from pipelines.bench.data_plain import PlainDecode, clip_looks, plain_loader
from pipelines.bench.data_starved import starved_figures
from pipelines.bench.packing_fill import packing_fill
from pipelines.bench.writer import BenchReport, Figure, alternate, environment, measured
from pipelines.training.data_root import data_root

WARM_S, WINDOW_S = 10.0, 8.0
"""Before a window opens, and how long it is."""
PICTURE_SIZE = (224, 224)
"""What both sides decode pictures to: the tiny encoder's native resolution of them."""


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Measure.

    Args:
        quick: Fewer alternations (the same shards, windows and workers).  seed: Draws other media and another order.
    """
    repeats = 2 if quick else 5
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="omni-data-") as folder:
        root = Path(folder)
        clips = write_material(root, seed)
        recipe = material_recipe(root, workers, seed)
        decode = PlainDecode(PICTURE_SIZE, clip_looks(clips, recipe.networks.vision))
        alone = _in_process(root, recipe, decode, 3 if quick else 5)
        with local_or_joined():
            stream = _through_ray(root, recipe, decode, repeats)
            starved = starved_figures(seed)
    tiny = load_recipe("tiny", [f"seed={seed}"])
    return BenchReport(
        bench="data",
        environment=environment(seed=seed, quick=quick, workers=workers, films=len(set(clips))),
        figures=(*stream, *alone, *starved, packing_fill(data_root(tiny), seed)),
    )


def _through_ray(root: Path, recipe: Recipe, decode: PlainDecode, repeats: int) -> tuple[Figure, ...]:
    decoded_here: list[float] = []
    workers = recipe.data.workers

    def ours(packed: bool) -> float:
        chosen = material_recipe(root, workers, recipe.seed, packed=packed)
        rate, fraction = feeder_rate(Feeder(chosen, root, 0))
        decoded_here.append(fraction)
        return rate

    plain = plain_loader(root, decode, workers, SHARES, CLIPS // SHARDS)
    sides = {"ray": lambda: ours(False), "packed": lambda: ours(True), "plain": lambda: window_rate(plain(), len)}
    rates = alternate(sides, repeats)
    ratios, packed = ([a / b for a, b in zip(rates[name], rates["plain"], strict=True)] for name in ("ray", "packed"))
    against = f"webdataset + torchvision/PyAV in torch's DataLoader; {workers} workers each, 28 JPEGs to 4 films"
    return (
        measured("throughput_ratio", ratios, unit="ratio", better="higher", goal=0.7, against=against),
        measured(
            "ray_data_fraction",
            decoded_here,
            unit="fraction",
            better="higher",
            goal=1.0,
            against="samples that a Ray Data worker decoded, of those given out",
        ),
        measured(
            "packed_throughput_ratio",
            packed,
            unit="ratio",
            better="higher",
            against=f"a blend, packed by best fit, over the plain loader; {workers} workers each",
        ),
        measured("ray_samples_per_s", rates["ray"], unit="samples/s", better="higher"),
        measured("plain_samples_per_s", rates["plain"], unit="samples/s", better="higher"),
    )


def _in_process(root: Path, recipe: Recipe, decode: PlainDecode, repeats: int) -> tuple[Figure, ...]:
    builder = StepBuilder(recipe, root)
    step = iter(range(recipe.total_steps))
    plain = plain_loader(root, decode, 0, SHARES, CLIPS // SHARDS)()

    def rate(take: Callable[[], int]) -> float:
        take()
        started, samples = time.perf_counter(), 0
        while time.perf_counter() - started < WINDOW_S / 2:
            samples += take()
        return samples / (time.perf_counter() - started)

    sides = {
        "ours": lambda: rate(lambda: _samples(builder.build(next(step)))),
        "plain": lambda: rate(lambda: len(next(plain))),
    }
    rates = alternate(sides, repeats)
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    against = "the same functions without Ray over the plain loader without workers"
    return (
        measured("in_process_ratio", ratios, unit="ratio", better="higher", goal=0.95, against=against),
        measured("in_process_samples_per_s", rates["ours"], unit="samples/s", better="higher"),
    )


def window_rate(batches: Iterator[Any], count: Callable[[Any], int]) -> float:
    """Samples a second of an endless loader in a window that opens when it has given for :data:`WARM_S`."""
    next(batches)  # however long starting takes
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_S:
        next(batches)
    opened, samples = time.perf_counter(), 0
    while time.perf_counter() - opened < WINDOW_S:
        samples += count(next(batches))
    return samples / (time.perf_counter() - opened)


def feeder_rate(feeder: Feeder) -> tuple[float, float]:
    """(samples a second, share decoded by Ray Data's workers) of a feeder asked for step after step."""
    here, elsewhere = 0, 0

    def steps() -> Iterator[int]:
        nonlocal here, elsewhere
        for step in range(feeder.recipe.total_steps):
            plan, _ = feeder.plan(step)
            keys = [("rows", batch.index, 0) for batch in plan.micro_batches]
            keys += sorted({(i.modality.value, i.micro_batch, i.encoder_rank) for i in plan.items})
            feeder.payloads(step, keys)
            samples = sum(len(batch.samples) for batch in plan.micro_batches)
            if feeder.prepared_by(step) == os.getpid():
                here += samples
            else:
                elsewhere += samples
            yield samples

    rate = window_rate(steps(), int)
    feeder.stop()
    return rate, elsewhere / max(1, here + elsewhere)


def _samples(prepared: PreparedStep) -> int:
    return sum(len(batch.samples) for batch in prepared.plan.micro_batches)
