"""From a state to the next step's draw and the state after it: mixture, shuffle and packing in one arithmetic.

The draw is a pure function of (recipe, state), and the state after n steps one of (recipe, n): readers, ranks and
prefetch depth do not enter. A plain mixture without packing has its state in closed form at any step; nested mixtures
and packing carry it from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from omni_ray.config.curriculum import Packing
from omni_ray.config.mixture import Branch, Mixture, StepValue
from omni_ray.data.mixture import MixtureTree, SampleRows, Stream, stream_of, stream_of_key
from omni_ray.data.order import Piece, SampleRef, StageDraws, StepDraw, drawn_before
from omni_ray.data.order_state import Held, OrderState
from omni_ray.data.packing import best_fit, cut_row
from omni_ray.data.permute import place
from omni_ray.types.errors import DataError

Measure = Callable[[SampleRef], SampleRows]
"""Rows of a sample; DataError where they cannot be counted."""
MOST_BAD = 64
"""Samples in a row that cannot be counted before the run stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """What the order needs to know of a stage."""

    name: str
    steps: int
    mixture: Mixture
    packing: Packing
    sequences: int
    """Packed sequences of a step, where packing fills them."""
    rows: int
    """Rows of one packed sequence."""

    @property
    def plain(self) -> bool:
        """Whether its position needs no state."""
        return self.mixture.counts is not None and self.packing.kind == "balance"

    @property
    def tree_form(self) -> Mixture:
        """The nested form; a plain mixture's counts are shares of samples."""
        if self.mixture.counts is None:
            return self.mixture
        branches = tuple(Branch(source=name, weight=value) for name, value in self.mixture.counts.items())
        return Mixture(blend=branches, per="samples")


class OrderPlanner:
    """Draws step after step."""

    def __init__(self, stages: Sequence[StageOrder], sizes: Mapping[str, int], seed: int, measure: Measure) -> None:
        """Prepare.

        Args:
            stages: In order.  sizes: Samples by source.  seed: The recipe's.  measure: Rows of a sample.
        Raises:
            DataError: a source of a nested mixture is empty.
        """
        self.stages = tuple(stages)
        self.sizes = dict(sizes)
        self.seed = seed
        self.measure = measure
        self.steps = sum(stage.steps for stage in stages)
        self._trees = {i: MixtureTree(s.tree_form, sizes) for i, s in enumerate(stages) if not s.plain}
        self.streams: dict[str, Stream] = {}
        """Every stream by its key."""
        for stage in stages:
            for source in stage.mixture.counts or {}:
                if sizes.get(source, 0) > 0:
                    self.streams[source] = stream_of(source, sizes)
        for tree in self._trees.values():
            self.streams |= tree.streams

    def stage_of(self, step: int) -> tuple[int, int]:
        """(number of the stage, step inside it) of a global step.

        Raises:
            DataError: there is no such step.
        """
        first = 0
        for number, stage in enumerate(self.stages):
            if 0 <= step - first < stage.steps:
                return number, step - first
            first += stage.steps
        raise DataError(f"step {step} draws no samples; the stages end at step {first}")

    def start(self) -> OrderState:
        """Before the first step."""
        return OrderState(drawn=dict.fromkeys(self.streams, 0))

    def state_at(self, step: int, known: OrderState | None = None) -> OrderState:
        """The state before a step: in closed form as far as plain stages reach, from there step by step.

        Args:
            step: Global step, up to the number of steps.  known: A state to go on from, if it lies before ``step``.
        """
        state = known if known is not None and known.step <= step else self._closed_form(step)
        if step - state.step > 1 and state == self._closed_form(state.step):
            state = self._closed_form(step)
        while state.step < step:
            state = self.advance(state)[1]
        return state

    def advance(self, state: OrderState) -> tuple[StepDraw, OrderState]:
        """The draw of step ``state.step`` and the state after it.

        Raises:
            DataError: the step lies beyond the last stage, a source is empty, a sample does not fit its sequence, too
                many samples in a row cannot be counted, or shares of modalities cannot be met.
        """
        number, inside = self.stage_of(state.step)
        stage = self.stages[number]
        hand = _Hand(self, state, number, inside)
        groups = None
        if stage.plain:
            hand.counts(stage)
        elif stage.packing.kind == "best_fit":
            groups = hand.best_fit(stage)
        elif stage.packing.kind == "split":
            groups = hand.split(stage)
        else:
            hand.amount(stage)
        last = inside + 1 == stage.steps
        after = hand.state(state, leaves_stage=last)
        pieces, bad = tuple(hand.pieces), tuple(hand.bad)
        return StepDraw(step=state.step, pieces=pieces, groups=groups, bad=bad, after=after), after

    def ref(self, held: Held) -> SampleRef:
        """The sample of a draw."""
        stream = self.stream(held.stream)
        inside = place(self.seed, stream.key, stream.size, held.number)
        return SampleRef(source=stream.source, index=stream.first + inside, turn=held.number // stream.size)

    def tree(self, number: int) -> MixtureTree:
        """Nested mixture of a stage."""
        return self._trees[number]

    def stream(self, key: str) -> Stream:
        """The stream of a key.

        Raises:
            DataError: its source is empty or not there.
        """
        if key not in self.streams:  # drawn under another mixture, and still to be placed
            self.streams[key] = stream_of_key(key, self.sizes)
        return self.streams[key]

    def _closed_form(self, step: int) -> OrderState:
        reach, plain = 0, []
        for stage in self.stages:
            if not stage.plain or reach >= step:
                break
            plain.append(StageDraws(steps=stage.steps, mixture=stage.mixture.counts or {}))
            reach += stage.steps
        at = min(step, reach)
        return replace(self.start(), step=at, drawn={**self.start().drawn, **drawn_before(plain, at)})


class _Hand:
    """What one step takes out of the state while it is drawn."""

    def __init__(self, planner: OrderPlanner, state: OrderState, number: int, inside: int) -> None:
        self.planner, self.inside = planner, inside
        self.tree = None if planner.stages[number].plain else planner.tree(number)
        self.factors = state.factors
        self.drawn = dict(state.drawn)
        slots = 0 if self.tree is None else self.tree.slots
        self.credits = state.credits if inside and len(state.credits) == slots else (0,) * slots
        self.buffer = list(state.buffer)
        self.waiting = list(state.waiting)
        self.rows = list(state.rows) if inside else [0, 0, 0]
        self.pieces: list[Piece] = []
        self.bad: list[str] = []

    def state(self, before: OrderState, *, leaves_stage: bool) -> OrderState:
        """The state after the step; at the end of a stage its remainder joins what waits."""
        text, vision, speech = self.rows
        return OrderState(
            step=before.step + 1,
            drawn=self.drawn,
            credits=() if leaves_stage else self.credits,
            buffer=() if leaves_stage else tuple(self.buffer),
            waiting=tuple(self.waiting) + (tuple(self.buffer) if leaves_stage else ()),
            factors={} if leaves_stage else before.factors,
            rows=(text, vision, speech),
        )

    def take(self, stream: Stream) -> Held:
        """The next draw of a stream: what earlier stages left over of it first."""
        for place_, held in enumerate(self.waiting):
            if held.stream == stream.key:
                return self.waiting.pop(place_)
        number = self.drawn.get(stream.key, 0)
        self.drawn[stream.key] = number + 1
        return Held(stream=stream.key, number=number)

    def place(self, held: Held, stop: int | None = None) -> int:
        """Put a sample's rows into the step; returns the piece's place."""
        self.pieces.append(Piece(ref=self.planner.ref(held), start=held.start, stop=stop))
        return len(self.pieces) - 1

    def next(self) -> tuple[Held, SampleRows]:
        """The next sample of the nested mixture; those that cannot be counted are passed over."""
        assert self.tree is not None
        for _ in range(MOST_BAD):
            stream, way = self.tree.turn(self.credits, self.inside, self.factors)
            held = self.take(stream)
            try:
                rows = self.planner.measure(self.planner.ref(held))
            except DataError as error:
                self.bad.append(f"{self.planner.ref(held)}: {error}")
                continue
            self.credits = self.tree.charge(self.credits, way, rows, self.inside, self.factors)
            self.rows = [before + more for before, more in zip(self.rows, rows.by_modality, strict=True)]
            return held, rows
        raise DataError(f"{MOST_BAD} samples in a row cannot be used; the first: {self.bad[-MOST_BAD]}")

    def counts(self, stage: StageOrder) -> None:
        """Draw the plain form's samples, in the order in which the curriculum first names their sources."""
        counts = _plain_counts(stage, self.inside)
        known = [source for source in self.planner.streams if source in counts]
        for source in (*known, *(source for source in counts if source not in known)):
            for _ in range(counts[source]):
                self.place(self.take(self.planner.stream(source)))
        if not self.pieces:
            raise DataError(
                f"step {self.inside} of stage {stage.name} draws no samples: its counts sum to less than 1; raise them"
            )

    def best_fit(self, stage: StageOrder) -> tuple[tuple[int, ...], ...]:
        """Fill sequences with whole samples out of a full buffer."""
        groups = []
        lengths = [self._rows_left(held) for held in self.buffer]
        for _ in range(stage.sequences):
            self._fill_buffer(stage, lengths)
            chosen = best_fit(lengths, stage.rows)
            groups.append(tuple(self.place(self.buffer[i]) for i in chosen))
            for i in reversed(chosen):
                del self.buffer[i], lengths[i]
        if self.inside + 1 < stage.steps:
            self._fill_buffer(stage, lengths)  # so that the remainder, and so the state, has one size
        return tuple(groups)

    def split(self, stage: StageOrder) -> tuple[tuple[int, ...], ...]:
        """Fill sequences one sample after another and cut the last; its rest opens the next sequence."""
        groups = []
        for _ in range(stage.sequences):
            room = stage.rows
            group: list[int] = []
            while room > 0:
                held, rows = self._carried() or self.next()
                stop = cut_row(rows.total, held.start, room, rows.held)
                if stop == held.start and not group:
                    raise DataError(
                        f"{self.planner.ref(held)} has a media item longer than the {stage.rows} rows of a sequence "
                        f"of stage {stage.name}; raise packing.budget"
                    )
                if stop > held.start:
                    group.append(self.place(held, None if stop == rows.total else stop))
                room -= stop - held.start
                if stop < rows.total:
                    self.buffer.insert(0, replace(held, start=stop))
                    break
            groups.append(tuple(group))
        return tuple(groups)

    def amount(self, stage: StageOrder) -> None:
        """Draw samples, rows or cost up to what a step takes; the sample that goes over it opens the next step."""
        take = stage.mixture.take
        assert take is not None
        if take.samples is not None:
            for _ in range(take.samples):
                self.place((self._carried() or self.next())[0])
            return
        spent, limit = 0.0, float(take.rows or take.cost or 0)
        while True:
            held, rows = self._carried() or self.next()
            size = rows.total - held.start if take.rows is not None else rows.cost
            if self.pieces and spent + size > limit:
                self.buffer.insert(0, held)
                return
            self.place(held)
            spent += size

    def _carried(self) -> tuple[Held, SampleRows] | None:
        if not self.buffer:
            return None
        held = self.buffer.pop(0)
        return held, self.planner.measure(self.planner.ref(held))

    def _fill_buffer(self, stage: StageOrder, lengths: list[int]) -> None:
        while len(self.buffer) < stage.packing.lookahead:
            held, rows = self.next()
            left = rows.total - held.start
            if left > stage.rows:
                raise DataError(
                    f"{self.planner.ref(held)} has {left} rows, a sequence of stage {stage.name} {stage.rows}; "
                    "raise packing.budget, or pack by split"
                )
            self.buffer.append(held)
            lengths.append(left)

    def _rows_left(self, held: Held) -> int:
        return self.planner.measure(self.planner.ref(held)).total - held.start


def _plain_counts(stage: StageOrder, inside: int) -> dict[str, int]:
    counts: Mapping[str, StepValue] = stage.mixture.counts or {}
    draws = StageDraws(steps=stage.steps, mixture=counts)
    before, after = draws.drawn(inside), draws.drawn(inside + 1)
    return {source: after[source] - before[source] for source in counts}
