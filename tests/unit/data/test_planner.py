"""Steps from a state: nothing repeated, nothing lost, the same from any stop, and a state that stays small."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from omni_ray.config.curriculum import Packing
from omni_ray.config.mixture import Mixture
from omni_ray.data.mixture import SampleRows
from omni_ray.data.order import SampleRef, StageDraws, samples_of_step
from omni_ray.data.order_state import Held, OrderState
from omni_ray.data.planner import OrderPlanner, StageOrder
from omni_ray.types.errors import CheckpointError, DataError

SIZES = {"text": 400, "speech": 90, "picture": 150, "video": 60}
TREE: dict[str, Any] = {
    "modalities": {
        "text": {"share": 2, "blend": [{"source": "text"}]},
        "vision": {
            "share": 1,
            "blend": [
                {"source": "picture", "repeat": 2},
                {"source": "video", "part": [0, 0.2]},
                {"source": "video", "part": [0.2, 1]},
            ],
        },
        "speech": {"share": {"linear": [[0, 1], [20, 2]]}, "blend": [{"source": "speech"}]},
    }
}


def rows_of(ref: SampleRef) -> SampleRows:
    length = 4 + (ref.index * 7919 + len(ref.source) * 31) % 37
    if ref.source in ("picture", "video"):
        return SampleRows(text=length // 3, vision=length, cost=2.0 * length, held=((2, 2 + length),))
    if ref.source == "speech":
        return SampleRows(text=3, speech=length, cost=length, held=((2, 3 + length),))
    return SampleRows(text=length, cost=length)


def stage(name: str, steps: int, mixture: dict[str, Any], kind: str = "balance", **more: Any) -> StageOrder:
    packing = Packing.model_validate({"kind": kind, "lookahead": more.pop("lookahead", 16)})
    return StageOrder(
        name=name,
        steps=steps,
        mixture=Mixture.model_validate(mixture),
        packing=packing,
        sequences=more.get("sequences", 3),
        rows=more.get("rows", 128),
    )


STAGES = {
    "plain": [
        stage("A", 9, {"text": 3, "speech": 0.5}),
        stage("B", 6, {"picture": 2, "text": {"linear": [[0, 1], [5, 4]]}}),
    ],
    "best-fit": [stage("A", 9, TREE, "best_fit"), stage("B", 8, {"text": 2, "speech": 1}, "best_fit", rows=100)],
    "split": [stage("A", 9, TREE, "split"), stage("B", 8, {"text": 2, "picture": 1}, "split", rows=64)],
    "rows": [stage("A", 9, TREE | {"take": {"rows": 300}}), stage("B", 9, TREE | {"take": {"samples": 7}})],
    "cost": [stage("A", 9, TREE | {"take": {"cost": 400}}), stage("B", 5, {"text": 4, "speech": 3})],
    "all": [
        stage("A", 5, {"text": 3, "speech": 0.5}),
        stage("B", 5, TREE, "best_fit"),
        stage("C", 5, TREE, "split"),
        stage("D", 5, TREE | {"take": {"cost": 300}}),
        stage("E", 5, {"text": 3, "picture": 3, "speech": 1}),
    ],
}


def planner(kind: str, seed: int = 3) -> OrderPlanner:
    return OrderPlanner(STAGES[kind], SIZES, seed, rows_of)


def stream(plan: OrderPlanner, state: OrderState) -> list[list[str]]:
    out = []
    while state.step < plan.steps:
        draw, state = plan.advance(state)
        groups = draw.groups or (tuple(range(len(draw.pieces))),)
        out.append([f"{number}/{draw.pieces[i]}" for number, group in enumerate(groups) for i in group])
    return out


@pytest.mark.parametrize("kind", STAGES)
def test_any_stop_continues_the_same(kind: str) -> None:
    whole = stream(planner(kind), planner(kind).start())
    assert len(whole) == planner(kind).steps
    state, plan = planner(kind).start(), planner(kind)
    for step in range(plan.steps):
        saved = OrderState.from_record(json.loads(json.dumps(state.to_record())))
        assert saved == state
        assert stream(planner(kind), saved) == whole[step:]
        assert planner(kind).state_at(step) == state, "a state is a function of the step"
        state = plan.advance(state)[1]


@pytest.mark.parametrize("kind", STAGES)
def test_nothing_is_repeated_or_lost(kind: str) -> None:
    """All rows of every draw are placed once, or wait from a known row on."""
    plan = planner(kind)
    state = plan.start()
    placed: Counter[tuple[str, int]] = Counter()
    while state.step < plan.steps:
        draw, state = plan.advance(state)
        for piece in draw.pieces:
            stop = rows_of(piece.ref).total if piece.stop is None else piece.stop
            placed[str(piece.ref), piece.ref.turn] += stop - piece.start
    wanted: Counter[tuple[str, int]] = Counter()
    for key, count in state.drawn.items():
        for number in range(count):
            ref = plan.ref(Held(stream=key, number=number))
            assert (str(ref), ref.turn) not in wanted, "a draw names a sample that another draw has named"
            wanted[str(ref), ref.turn] = rows_of(ref).total
    for held in state.waiting + state.buffer:
        ref = plan.ref(held)
        wanted[str(ref), ref.turn] = held.start
    assert placed == +wanted


def test_plain_stages_equal_the_closed_form() -> None:
    plan = planner("plain")
    draws = [StageDraws(steps=s.steps, mixture=s.mixture.counts or {}) for s in STAGES["plain"]]
    state = plan.start()
    for step in range(plan.steps):
        draw, state = plan.advance(state)
        assert [piece.ref for piece in draw.pieces] == samples_of_step(draws, step, SIZES, 3)


@pytest.mark.parametrize("kind", ["best-fit", "split"])
def test_sequences_are_full(kind: str) -> None:
    plan = OrderPlanner([stage("A", 60, TREE, kind.replace("-", "_"), rows=256, lookahead=64)], SIZES, 0, rows_of)
    state, rows = plan.start(), []
    while state.step < plan.steps:
        draw, state = plan.advance(state)
        for group in draw.groups or ():
            pieces = [draw.pieces[i] for i in group]
            ends = [rows_of(p.ref).total if p.stop is None else p.stop for p in pieces]
            rows.append(sum(end - piece.start for end, piece in zip(ends, pieces, strict=True)))
    assert max(rows) <= 256
    assert np.mean(rows) / 256 >= 0.97


@pytest.mark.parametrize("take", ["rows", "cost"])
def test_steps_are_cut_by_amount_not_by_count(take: str) -> None:
    plan = OrderPlanner([stage("A", 30, TREE | {"take": {take: 500}})], SIZES, 0, rows_of)
    state, counts = plan.start(), set()
    while state.step < plan.steps:
        draw, state = plan.advance(state)
        sizes = [rows_of(piece.ref) for piece in draw.pieces]
        spent = sum(size.total if take == "rows" else size.cost for size in sizes)
        assert 500 - 120 < spent <= 500
        counts.add(len(sizes))
    assert len(counts) > 1


def test_changing_a_weight_neither_repeats_nor_loses() -> None:
    """Ten steps under one mixture, ten under another: every stream goes on where it stood."""
    first = OrderPlanner(
        [stage("A", 20, {"blend": [{"source": "text", "weight": 3}, {"source": "speech", "weight": 1}]}, "best_fit")],
        SIZES,
        5,
        rows_of,
    )
    second = OrderPlanner(
        [
            stage(
                "A",
                20,
                {
                    "blend": [
                        {"source": "picture", "weight": 1},
                        {"source": "speech", "weight": 4},
                        {"source": "text", "weight": 1},
                    ]
                },
                "best_fit",
            )
        ],
        SIZES,
        5,
        rows_of,
    )
    state, seen = first.start(), Counter[tuple[str, int]]()
    for plan in (first, second):
        for _ in range(10):
            draw, state = plan.advance(state)
            seen.update((str(piece.ref), piece.ref.turn) for piece in draw.pieces)
    assert set(seen.values()) == {1}
    waiting = {(str(second.ref(h)), second.ref(h).turn) for h in state.buffer + state.waiting}
    assert not waiting & set(seen)
    for name in ("text", "speech", "picture"):
        drawn = {n for n in (set(seen) | waiting) if n[0].startswith(name)}
        assert len(drawn) == state.drawn[name], "what was drawn was placed or waits"


def test_state_does_not_grow_with_rows() -> None:
    for kind in ("best-fit", "split", "rows"):
        one = STAGES[kind][0]
        plan = OrderPlanner(
            [stage("A", 1500, one.mixture.model_dump(mode="json"), one.packing.kind)], SIZES, 0, rows_of
        )
        state, sizes = plan.start(), {}
        while state.step < plan.steps - 1:
            state = plan.advance(state)[1]
            if state.step in (3, 1400):
                sizes[state.step] = len(json.dumps(state.to_record()))
        assert sizes[1400] / sizes[3] <= 1.01


def test_bad_samples_are_passed_over_the_same_way() -> None:
    def measure(ref: SampleRef) -> SampleRows:
        if ref.index % 10 == 3:
            raise DataError("its header is damaged")
        return rows_of(ref)

    plan = OrderPlanner(STAGES["best-fit"], SIZES, 0, measure)
    state, bad = plan.start(), []
    while state.step < plan.steps:
        draw, state = plan.advance(state)
        bad += draw.bad
        assert all(piece.ref.index % 10 != 3 for piece in draw.pieces)
    assert bad
    assert all("its header is damaged" in sentence for sentence in bad)

    def broken(ref: SampleRef) -> SampleRows:
        raise DataError("no")

    with pytest.raises(DataError, match="64 samples in a row cannot be used; the first: text:"):
        OrderPlanner(STAGES["split"], SIZES, 0, broken).advance(plan.start())


def test_what_does_not_fit_is_refused_by_name() -> None:
    plan = OrderPlanner([stage("A", 3, {"text": 1}, "best_fit", rows=20)], SIZES, 0, rows_of)
    with pytest.raises(DataError, match=r"text:\d+ has \d+ rows, a sequence of stage A 20; raise packing.budget"):
        plan.advance(plan.start())
    plan = OrderPlanner([stage("A", 3, {"picture": 1}, "split", rows=20)], SIZES, 0, rows_of)
    with pytest.raises(DataError, match="has a media item longer than the 20 rows of a sequence of stage A"):
        plan.state_at(3)
    with pytest.raises(DataError, match="source 'nothing' holds no samples"):
        OrderPlanner([stage("A", 3, {"nothing": 1})], SIZES, 0, rows_of).advance(OrderState())
    with pytest.raises(DataError, match="step 3 draws no samples; the stages end at step 3"):
        plan.advance(OrderState(step=3))


def test_records_that_are_not_ours_are_refused() -> None:
    record = planner("all").state_at(7).to_record()
    with pytest.raises(CheckpointError, match="has version 9, this program reads 1"):
        OrderState.from_record(record | {"version": 9})
    with pytest.raises(CheckpointError, match="the data position cannot be read"):
        OrderState.from_record(record | {"drawn": "###"})
    with pytest.raises(CheckpointError, match="the data position cannot be read"):
        OrderState.from_record({"version": 1})
