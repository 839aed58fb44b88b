"""Bridge: any N encoder ranks to any M language ranks bit for bit, memory over chunks, bandwidth of a hop."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from actors.cluster import local_or_joined
from omni_ray.bridge.redistribute import Item
from pipelines.bench.bridge_ranks import GroupRank, HopEnd, PairRank, features_of, language_loss
from pipelines.bench.writer import BenchReport, Figure, counted, environment, measured, negative_control

LARGEST = 8
CHUNKS = (1, 2, 4, 8)
HIDDEN = 1024
GROUP_BYTES = 256 * 2**20
HOP_BYTES = 64 * 2**20


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """All figures of the bridge.

    Args:
        quick: Fewer repeats of the timings.  seed: Draws other items, owners and empty ranks.
    """
    torch.set_num_threads(1)
    with local_or_joined(num_cpus=16):
        failures, empty = pairs(seed)
        caught = one_pair(*draw_pair(random.Random(seed + 1), 3, 4), 2, seed, start_ranks(4), flip=True)
        peaks = peak_bytes(2 if quick else 5)
        seconds = hop_seconds(5 if quick else 15)
    figures = [
        counted("pairs", LARGEST * LARGEST, n=LARGEST * LARGEST, goal=64, better="higher", against="N, M in 1..8"),
        counted("pair_failures", failures, n=LARGEST * LARGEST, goal=0, against="values and gradients, bit for bit"),
        counted(
            "empty_ranks",
            empty,
            n=LARGEST * LARGEST,
            goal=None,
            better="higher",
            against="ranks without items, all pairs",
        ),
        negative_control(int(caught), "flip of one bit of one feature on its way"),
        *_peak_figures(peaks),
        *_hop_figures(seconds),
    ]
    return BenchReport(bench="bridge", environment=environment(seed=seed, quick=quick), figures=tuple(figures))


Lists = list[list[list[Item]]]
"""[language rank][encoder rank][items]."""


def draw_pair(rng: random.Random, encoders: int, languages: int) -> tuple[Lists, list[list[int]]]:
    """Items over N encoder and M language ranks, some of each left empty; and the token order at each language rank."""
    open_encoders = rng.sample(range(encoders), rng.randint(1, encoders))
    open_languages = rng.sample(range(languages), rng.randint(1, languages))
    lists: Lists = [[[] for _ in range(encoders)] for _ in range(languages)]
    order: list[list[int]] = [[] for _ in range(languages)]
    for item in range(rng.randint(1, 24)):
        language = rng.choice(open_languages)
        lists[language][rng.choice(open_encoders)].append((item, rng.randint(1, 12)))
        order[language].append(item)
    for items in order:
        rng.shuffle(items)
    return lists, order


def start_ranks(count: int) -> list[Any]:
    """Actors that stand for ranks."""
    remote: Any = ray.remote(PairRank)
    return [remote.options(num_cpus=0.1).remote() for _ in range(count)]


def pairs(seed: int) -> tuple[int, int]:
    """Failures over all pairs of pool sizes, and how many ranks were empty."""
    rng, ranks = random.Random(seed), start_ranks(LARGEST)
    failures = empty = 0
    for encoders in range(1, LARGEST + 1):
        for languages in range(1, LARGEST + 1):
            lists, order = draw_pair(rng, encoders, languages)
            failures += one_pair(lists, order, rng.choice((1, 2, 3, 5)), seed, ranks)
            empty += sum(not items for items in order)
            empty += sum(not any(lists[m][n] for m in range(languages)) for n in range(encoders))
    for actor in ranks:
        ray.kill(actor)
    return failures, empty


def one_pair(
    lists: Lists, order: list[list[int]], num_chunks: int, seed: int, ranks: Sequence[Any], flip: bool = False
) -> bool:
    """Whether any value or gradient differs from the single process."""
    languages, encoders = len(lists), len(lists[0])
    flipped = next((n for n in range(encoders) if any(lists[m][n] for m in range(languages))), 0) if flip else -1
    sent = []
    for n in range(encoders):
        options = ranks[n].encode.options(num_returns=languages * num_chunks)
        refs = options.remote([lists[m][n] for m in range(languages)], num_chunks, seed, n == flipped)
        sent.append(refs if languages * num_chunks > 1 else [refs])
    answers = []
    for m in range(languages):
        pieces = [ref for n in range(encoders) for ref in sent[n][m * num_chunks : (m + 1) * num_chunks]]
        options = ranks[m].language.options(num_returns=1 + encoders * num_chunks)
        answers.append(options.remote(lists[m], order[m], num_chunks, *pieces))
    gradients = []
    for n in range(encoders):
        pieces = [ref for m in range(languages) for ref in answers[m][1 + n * num_chunks : 1 + (n + 1) * num_chunks]]
        gradients.append(ranks[n].gradient.remote(*pieces))
    values = ray.get([answers[m][0] for m in range(languages)])
    return not _equal(lists, order, seed, values, ray.get(gradients))


def _equal(
    lists: Lists, order: list[list[int]], seed: int, values: Sequence[np.ndarray], gradients: Sequence[np.ndarray]
) -> bool:
    expected: list[list[torch.Tensor]] = [[] for _ in lists[0]]
    same = True
    for m, senders in enumerate(lists):
        leaves = {i: features_of([(i, n)], seed).requires_grad_() for items in senders for i, n in items}
        rows_ID = torch.cat([leaves[i] for i in order[m]]) if order[m] else features_of([], seed)
        same = same and np.array_equal(rows_ID.detach().numpy(), values[m])
        if order[m]:
            language_loss(rows_ID).backward()
        for sender, items in enumerate(senders):
            expected[sender] += [leaves[i].grad for i, _ in items]  # type: ignore[misc]
    for rows, gradient in zip(expected, gradients, strict=True):
        whole = torch.cat(rows).numpy() if rows else features_of([], seed).numpy()
        same = same and np.array_equal(whole, gradient)
    return same


def peak_bytes(repeats: int) -> dict[int, list[tuple[float, float]]]:
    """Peak of inner rank 0 by number of chunks: (tracked, process), one pair a repeat; four encoders, cp 2."""
    remote: Any = ray.remote(GroupRank)
    group = [remote.options(num_cpus=0.1).remote() for _ in range(4)]
    address = ray.get(group[0].address.remote())
    ray.get([actor.join.remote(rank, len(group), address) for rank, actor in enumerate(group)])
    rows = GROUP_BYTES // (4 * HIDDEN)
    lists = [[(rank, rows // 4)] for rank in range(4)]
    found: dict[int, list[tuple[float, float]]] = {chunks: [] for chunks in CHUNKS}
    for _ in range(repeats):
        for chunks in CHUNKS:
            found[chunks].append(ray.get([a.run.remote(lists, chunks, 2, HIDDEN) for a in group])[0])
    for actor in group:
        ray.kill(actor)
    return found


def _peak_figures(peaks: dict[int, list[tuple[float, float]]]) -> list[Figure]:
    figures = []
    for place, name in enumerate(("peak_times_chunks_tracked", "peak_times_chunks_process")):
        whole = [peak[place] for peak in peaks[1]]
        runs = [max(peaks[k][i][place] * k / whole[i] for k in CHUNKS if k > 1) for i in range(len(whole))]
        figures.append(measured(name, runs, unit="ratio", better="lower", goal=1.10, against=_PEAK))
    worst = max(figures, key=lambda figure: figure.value or 0.0)
    head = measured("peak_times_chunks", worst.runs, unit="ratio", better="lower", goal=1.10, against=_PEAK)
    return [head, *figures]


_PEAK = "worst over num_chunks 2, 4, 8 of peak(k) k / peak(1) on inner rank 0; 256 MB, 4 encoders, cp 2, gloo"


def hop_seconds(repeats: int) -> dict[str, list[float]]:
    """Seconds of one hop of 64 MB from actor to actor, three ways in turn, and of a copy in memory."""
    width = 1024
    remote: Any = ray.remote(HopEnd)
    sender, receiver = (remote.options(num_cpus=0.1).remote(HOP_BYTES // 4 // width, width) for _ in range(2))
    kinds = ("bridge", "numpy", "tensor")
    found: dict[str, list[float]] = {kind: [] for kind in (*kinds, "memcpy")}
    for turn in range(repeats + 2):
        for kind in kinds if turn % 2 else tuple(reversed(kinds)):
            started = time.perf_counter()
            handle = ray.get(sender.send.remote(kind))
            ray.get(receiver.receive.remote(kind, handle))
            taken = time.perf_counter() - started
            del handle
            if turn >= 2:  # the store's pages and the receiver's mapping are cold at first
                found[kind].append(taken)
        copied = ray.get(receiver.memcpy_s.remote())
        if turn >= 2:
            found["memcpy"].append(copied)
    for actor in (sender, receiver):
        ray.kill(actor)
    return found


def _hop_figures(seconds: dict[str, list[float]]) -> list[Figure]:
    def over(kind: str) -> list[float]:
        return [other / ours for ours, other in zip(seconds["bridge"], seconds[kind], strict=True)]

    gigabytes = HOP_BYTES / 1e9
    return [
        measured("bandwidth_over_numpy_put_get", over("numpy"), unit="ratio", better="higher", goal=0.9, against=_HOP),
        measured("bandwidth_over_tensor_put_get", over("tensor"), unit="ratio", better="higher", goal=5, against=_HOP),
        measured(
            "fraction_of_memcpy", over("memcpy"), unit="ratio", better="higher", against="copy into touched memory"
        ),
        measured("bridge_gb_per_s", [gigabytes / s for s in seconds["bridge"]], unit="GB/s", better="higher"),
        measured("numpy_gb_per_s", [gigabytes / statistics.median(seconds["numpy"])], unit="GB/s", better="higher"),
    ]


_HOP = "64 MB fp32 actor to actor through the object store, calls included, in turn"
