"""Whose turn it is: nested shares met by credits, in whole numbers, so that every machine draws the same.

Every branch of a blend holds a credit. The one with the most draws; what it drew is taken from its credit and given to
all branches by their shares (smooth weighted round robin, with lengths). Credits of a blend sum to 0 and stay within
about the longest sample, so a ratio is off by at most that, after any number of rows; and they are all there is to
save. Under ``modalities`` every row is charged to what it counts as (networks.md section 6), whichever branch drew it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from omni_ray.config.mixture import COUNTED, Branch, Mixture, StepValue
from omni_ray.types.errors import DataError

ONE = 1 << 32
"""A whole share; credits are rows (or samples) times this."""
REACH_ROWS, REACH_SAMPLES = 256, 12
"""A modality that is further behind than these rows and so many of the longest samples is out of reach."""
_REMEMBERED = 1024
_ALWAYS_ONE = StepValue(constant=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRows:
    """What order and packing must know of a sample; its media stay closed."""

    text: int
    """Rows that count as text."""
    vision: int = 0
    """Picture and video placeholders."""
    speech: int = 0
    """Rows with codec ids, and audio placeholders."""
    cost: float = 0.0
    """Language rows with the square of attention, and encoder work in the same unit."""
    held: tuple[tuple[int, int], ...] = ()
    """Stretches (first row, row after the last) that cannot be cut: media items, and the row before an answer's."""

    @property
    def total(self) -> int:
        """All rows."""
        return self.text + self.vision + self.speech

    @property
    def by_modality(self) -> tuple[int, int, int]:
        """Rows in the order of ``COUNTED``."""
        return self.text, self.vision, self.speech


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Numbered samples that are drawn without repeating within a pass: a source, or a stretch of one."""

    source: str
    """Source name."""
    first: int
    """First number."""
    size: int
    """Samples."""
    whole: bool = True
    """Whether it is all of the source."""

    @property
    def key(self) -> str:
        """Its name in the state; branches of one stream share its position."""
        return self.source if self.whole else f"{self.source}[{self.first}:{self.first + self.size}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A branch at work: a stream, or branches with credits."""

    title: str
    share: StepValue
    stream: Stream | None = None
    children: tuple[_Node, ...] = ()
    samples: bool = False
    """Whether its branches are counted in samples rather than rows."""
    slot: int = 0
    """First of its branches' credits."""
    samples_of_pass: Fraction = Fraction(0)
    """Samples of one pass; 0 for a blend of shares, which has none."""


@dataclass(slots=True)
class _Builder:
    sizes: Mapping[str, int]
    per_samples: bool
    slots: int = 0
    streams: dict[str, Stream] = field(default_factory=dict)

    def blend(self, title: str, branches: Sequence[Branch], share: StepValue) -> _Node:
        slot, self.slots = self.slots, self.slots + len(branches)
        counting = all(branch.share is None for branch in branches)
        children, length = [], Fraction(0)
        for branch in branches:
            node = self.branch(branch)
            if counting:
                samples = Fraction(branch.choose or 0) or Fraction(str(branch.repeat or 1)) * node.samples_of_pass
                length += samples
                node = replace(node, share=StepValue(constant=float(samples)))
            children.append(node)
        return _Node(
            title=title,
            share=share,
            children=tuple(children),
            samples=counting or self.per_samples,
            slot=slot,
            samples_of_pass=length,
        )

    def branch(self, branch: Branch) -> _Node:
        share = branch.share or _ALWAYS_ONE
        if branch.blend:
            return self.blend(branch.title, branch.blend, share)
        assert branch.source is not None
        stream = stream_of(branch.source, self.sizes, branch.part)
        self.streams[stream.key] = stream
        return _Node(title=branch.title, share=share, stream=stream, samples_of_pass=Fraction(stream.size))


class MixtureTree:
    """The nested form of a mixture over sources of known sizes."""

    def __init__(self, mixture: Mixture, sizes: Mapping[str, int]) -> None:
        """Build it.

        Raises:
            DataError: a source is empty, or a stretch of one holds no sample.
        """
        builder = _Builder(sizes=sizes, per_samples=mixture.per == "samples")
        self.modalities = tuple(name for name in COUNTED if name in mixture.modalities)
        if self.modalities:
            builder.slots = len(self.modalities)
            parts = [mixture.modalities[name] for name in self.modalities]  # type: ignore[index]
            children = tuple(
                builder.blend(name, part.blend, part.share) for name, part in zip(self.modalities, parts, strict=True)
            )
            self._root = _Node(title="modalities", share=_ALWAYS_ONE, children=children)
        else:
            self._root = builder.blend("blend", mixture.blend, _ALWAYS_ONE)
        self.slots = builder.slots + bool(self.modalities)
        """How many whole numbers it remembers: credits and, under modalities, the rows of the longest sample."""
        self.streams = builder.streams
        """By key."""
        self._memory: dict[tuple[object, ...], list[int]] = {}

    def turn(
        self, credits: Sequence[int], step: int, factors: Mapping[str, float] | None = None
    ) -> tuple[Stream, tuple[tuple[_Node, int], ...]]:
        """Whose turn it is.

        Args:
            credits: ``slots`` whole numbers, 0 at the start.  step: Step inside the stage.
            factors: What the perplexity gap makes of a subset's weight, by title; absent = 1.
        Returns:
            The stream, and the way to it for :meth:`charge`.
        """
        node, way = self._root, []
        while node.stream is None:
            shares = self._shares(node, step, factors)
            open_slots = [i for i, share in enumerate(shares) if share > 0]
            chosen = max(open_slots, key=lambda i: (credits[node.slot + i], -i))
            way.append((node, chosen))
            node = node.children[chosen]
        return node.stream, tuple(way)

    def charge(
        self,
        credits: Sequence[int],
        way: Sequence[tuple[_Node, int]],
        rows: SampleRows,
        step: int,
        factors: Mapping[str, float] | None = None,
    ) -> tuple[int, ...]:
        """Credits after a drawn sample.

        Raises:
            DataError: the shares of modalities cannot be met by what is drawn.
        """
        after = list(credits)
        for depth, (node, chosen) in enumerate(way):
            shares = self._shares(node, step, factors)
            if depth == 0 and self.modalities:
                spent = [rows.by_modality[COUNTED.index(name)] for name in self.modalities]
            else:
                amount = 1 if node.samples else rows.total
                spent = [amount if i == chosen else 0 for i in range(len(shares))]
            total = sum(spent)
            for i, share in enumerate(shares):
                after[node.slot + i] += share * total - ONE * spent[i]
            if depth == 0 and self.modalities:
                after[-1] = max(after[-1], rows.total)
                self._check_reach(after, node)
        return tuple(after)

    def _shares(self, node: _Node, step: int, factors: Mapping[str, float] | None) -> list[int]:
        """Shares of a node's branches in a step: whole numbers that sum to ``ONE`` exactly."""
        level = all(child.share.constant is not None for child in node.children)
        scales = tuple(factors.get(child.title, 1.0) for child in node.children) if factors else ()
        key = (id(node), 0 if level else step, scales)
        if key not in self._memory:
            if len(self._memory) >= _REMEMBERED:
                self._memory.clear()
            self._memory[key] = _whole_shares(node, step, scales)
        return self._memory[key]

    def _check_reach(self, credits: Sequence[int], node: _Node) -> None:
        worst = max(range(len(self.modalities)), key=lambda i: credits[node.slot + i])
        behind = credits[node.slot + worst] // ONE
        if behind > REACH_ROWS + REACH_SAMPLES * credits[-1]:
            name = self.modalities[worst]
            raise DataError(
                f"the share of {name} cannot be met: it is {behind} rows behind although its branches are drawn first; "
                f"their samples hold too many rows of other modalities, so lower modalities.{name}.share or add purer "
                f"{name} samples"
            )


def stream_of_key(key: str, sizes: Mapping[str, int]) -> Stream:
    """The stream of a key in a state.

    Raises:
        DataError: its source is not there.
    """
    source, bracket, stretch = key.partition("[")
    size = sizes.get(source, 0)
    if size < 1:
        raise DataError(f"source {source!r} holds no samples; build or point to its shards")
    if not bracket:
        return Stream(source=source, first=0, size=size)
    first, stop = (int(edge) for edge in stretch.rstrip("]").split(":"))
    return Stream(source=source, first=first, size=stop - first, whole=False)


def stream_of(source: str, sizes: Mapping[str, int], part: tuple[float, float] = (0.0, 1.0)) -> Stream:
    """A source, or a stretch of it.

    Raises:
        DataError: it holds no samples.
    """
    size = sizes.get(source, 0)
    if size < 1:
        raise DataError(f"source {source!r} holds no samples; build or point to its shards")
    first, stop = (int(Fraction(str(edge)) * size) for edge in part)
    if stop <= first:
        raise DataError(f"part {list(part)} of source {source!r} with {size} samples holds none; widen it")
    return Stream(source=source, first=first, size=stop - first, whole=(first, stop) == (0, size))


def _whole_shares(node: _Node, step: int, scales: Sequence[float]) -> list[int]:
    weights = [child.share.at(step) for child in node.children]
    if scales:
        weights = [weight * Fraction(scale) for weight, scale in zip(weights, scales, strict=True)]
    total = sum(weights)
    if total <= 0:
        raise DataError(
            f"every branch of {node.title!r} has weight 0 at step {step} of the stage; give one of them more"
        )
    shares = [int(weight * ONE / total) for weight in weights]
    shares[max(range(len(shares)), key=lambda i: (shares[i], -i))] += ONE - sum(shares)
    return shares
