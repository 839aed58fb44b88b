"""Loads drawn from the report's Table 2, and step plans over them; numpy alone, no torch.

Vision and audio are log-normal, fitted to mean and standard deviation and clipped to minimum and maximum; language is
beta-distributed on [minimum, maximum].  A micro-batch's vision splits into 1 to 8 items (Dirichlet).  Forward figures:
a backward takes twice as long, and the encoders run their forward again in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omni_ray.balance.dispatch import deal, light_ends
from omni_ray.balance.step_plan import PoolRanks, dispatch_items
from omni_ray.schedule.order import Kind, call_order
from omni_ray.schedule.replay import Task
from omni_ray.types.batch import ItemRoute, MicroBatchPlan, StepPlan
from omni_ray.types.modality import Modality

AUDIO = (0.01, 109.96, 3.29, 7.94)
VISION = (0.08, 400.37, 89.85, 61.02)
LANGUAGE = (1920.57, 4667.74, 3531.32, 1111.11)
"""Minimum, maximum, mean, standard deviation; TFLOP per micro-batch, SFT.  Source: report, Table 2."""
MICRO_BATCHES = 16
"""Per language replica."""
LANGUAGE_PASSES = 3.0
"""Forward, and a backward of twice that."""
ENCODER_BACKWARD_PASSES = 3.0
"""Forward again, and a backward of twice that."""


def log_normal(rng: np.random.Generator, table: tuple[float, float, float, float], size: int) -> NDArray[np.float64]:
    """Log-normal draws with the table's mean and deviation, clipped to its ends."""
    low, high, mean, std = table
    variance = math.log(1.0 + (std / mean) ** 2)
    return np.clip(rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), size), low, high)


def beta(rng: np.random.Generator, table: tuple[float, float, float, float], size: int) -> NDArray[np.float64]:
    """Beta draws on [minimum, maximum] with the table's mean and deviation."""
    low, high, mean, std = table
    centre, spread = (mean - low) / (high - low), (std / (high - low)) ** 2
    weight = centre * (1 - centre) / spread - 1
    return low + (high - low) * rng.beta(centre * weight, (1 - centre) * weight, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Forward cost of one micro-batch, TFLOP."""

    language: float
    """Backbone."""
    vision: tuple[float, ...]
    """Items."""
    audio: float
    """One item."""


def draw_loads(seed: int, count: int) -> list[Load]:
    """``count`` micro-batches."""
    rng = np.random.default_rng(seed)
    vision, audio, language = log_normal(rng, VISION, count), log_normal(rng, AUDIO, count), beta(rng, LANGUAGE, count)
    return [
        Load(
            language=float(language[i]),
            vision=tuple(float(v) for v in vision[i] * rng.dirichlet(np.ones(int(rng.integers(1, 9))))),
            audio=float(audio[i]),
        )
        for i in range(count)
    ]


def plan_of(loads: Sequence[Load], ranks: PoolRanks, step: int, media: bool = True) -> tuple[StepPlan, list[float]]:
    """The plan of a step over these micro-batches, and the language cost of each in plan order.

    Args:
        media: False leaves the encoders without work: text only.
    """
    placed = [loads[i] for i in light_ends([sum(load.vision) + load.audio for load in loads])]
    language = [load.language for load in placed]
    owners = deal(language, ranks.language)
    items: list[ItemRoute] = []
    for index, load in enumerate(placed if media else ()):
        costs = [(Modality.VISION, cost) for cost in load.vision] + [(Modality.AUDIO, load.audio)]
        for place, (modality, cost) in enumerate(costs):
            items.append(
                ItemRoute(
                    id=len(items),
                    modality=modality,
                    cost=cost,
                    encoder_rank=0,
                    language_rank=owners[index],
                    micro_batch=index,
                    offset=place,
                    length=1,
                    tile=2 * index + (modality == Modality.AUDIO),
                )
            )
    plan = StepPlan(
        step=step,
        stage="slept",
        micro_batches=tuple(
            MicroBatchPlan(index=i, language_rank=rank, samples=(), lengths=(len(items),))
            for i, rank in enumerate(owners)
        ),
        order=tuple(range(len(placed))),
        items=dispatch_items(items, ranks),
        counts={"rows": len(placed)},
    )
    return plan, language


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who runs on which simulated device."""

    devices: int
    """In all."""
    encoders: int
    """Ranks of each encoder pool; vision rank r and audio rank r share a device."""
    language: int
    """Language ranks."""
    colocate: bool = False
    """Encoder and language ranks share devices."""
    apart: bool = False
    """Audio ranks have devices of their own, too."""
    passes: tuple[float, float] = (LANGUAGE_PASSES, ENCODER_BACKWARD_PASSES)
    """Cost of the language call and of an encoder's backward, in forwards."""

    @property
    def ranks(self) -> PoolRanks:
        """Pool sizes."""
        inner = self.encoders // self.language if self.colocate else 0
        return PoolRanks(vision=self.encoders, audio=self.encoders, language=self.language, inner_dp=inner)

    def device(self, pool: str, rank: int) -> int:
        """Device of a rank."""
        if pool != "language":
            return rank + self.encoders * (self.apart and pool == "audio")
        if self.colocate:
            return rank * (self.encoders // self.language)
        return self.encoders * (1 + self.apart) + rank


def separate(devices: int, encoders: int) -> Layout:
    """Encoders on their own devices, language on the rest."""
    return Layout(devices=devices, encoders=encoders, language=devices - encoders)


def tasks_of(
    plan: StepPlan, language: Sequence[float], layout: Layout, kind: str, window: int, call_s: float = 0.0
) -> list[Task]:
    """The calls of a step, as the driver submits them, with their cost as duration.

    Args:
        call_s: Added to every call.
    """
    tasks: list[Task] = []
    costs: dict[tuple[int, Modality, int], float] = {}
    for item in plan.items:
        key = (item.micro_batch, item.modality, item.encoder_rank)
        costs[key] = costs.get(key, 0.0) + item.cost
    senders: dict[int, list[tuple[Modality, int]]] = {}
    for micro_batch, modality, rank in sorted(costs):
        senders.setdefault(micro_batch, []).append((modality, rank))
    encoded: dict[int, list[int]] = {}
    answered: dict[int, int] = {}
    gate: tuple[int, ...] = ()
    since = 0

    def add(pool: str, rank: int, seconds: float, needs: Sequence[int]) -> int:
        tasks.append(Task((pool, rank), layout.device(pool, rank), seconds + call_s, (*gate, *needs)))
        return len(tasks) - 1

    for call in call_order(kind, plan.order, window):
        index = call.micro_batch
        if call.kind == Kind.ENCODE:
            encoded[index] = [add(m.value, r, costs[index, m, r], ()) for m, r in senders.get(index, ())]
        elif call.kind == Kind.LANGUAGE:
            rank = plan.micro_batches[index].language_rank
            answered[index] = add("language", rank, language[index] * layout.passes[0], encoded[index])
        elif call.kind == Kind.ENCODER_BACKWARD:
            for m, r in senders.get(index, ()):
                add(m.value, r, costs[index, m, r] * layout.passes[1], (answered[index],))
        else:
            tasks.append(Task(("driver", 0), -1, 0.0, tuple(range(since, len(tasks)))))
            gate, since = (len(tasks) - 1,), len(tasks) - 1
    return tasks
