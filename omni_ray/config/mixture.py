"""The language of mixtures: what a stage draws from, in which shares, and how they change with the step.

Two forms. Plain: ``{text: 16, speech_text: 16}``, samples of each source in every step. Nested: ``blend`` (shares
inside shares) or ``modalities`` (shares of tokens), with the words that users of Energon and MosaicML streaming know:
``weight`` and ``proportion`` are shares, ``repeat`` and ``choose`` are samples of one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_serializer,
    model_validator,
)

from omni_ray.config.model import Checked
from omni_ray.types.errors import ConfigError

Knots = tuple[tuple[NonNegativeInt, NonNegativeFloat], ...]
COUNTED = ("text", "vision", "speech")
"""What a row can count as (networks.md section 6): any codec id or audio placeholder is speech, a picture or video
placeholder vision, the rest text."""
_NESTED_WORDS = ("blend", "modalities", "counts")


class StepValue(Checked):
    """A number that may change with the step, counted inside its stage."""

    constant: NonNegativeFloat | None = None
    linear: Knots = ()
    """``[[step, value], ...]``: straight lines between the knots, level outside."""
    piecewise: Knots = ()
    """``[[step, value], ...]``: each value holds from its step on; the first must be step 0."""

    @model_validator(mode="before")
    @classmethod
    def number_is_constant(cls, raw: Any) -> Any:
        """A bare number is the constant."""
        return raw if isinstance(raw, dict | StepValue) else {"constant": raw}

    @model_validator(mode="after")
    def one_form(self) -> Self:
        """Exactly one form, its steps rising."""
        if sum((self.constant is not None, bool(self.linear), bool(self.piecewise))) != 1:
            raise ConfigError("a value is a number, or one of {linear: [[step, value], ...]}, {piecewise: [...]}")
        knots = self.linear or self.piecewise
        for (before, _), (after, _) in pairwise(knots):
            if after <= before:
                raise ConfigError(f"knot {after} follows knot {before}; steps must rise")
        if self.piecewise and self.piecewise[0][0] != 0:
            raise ConfigError(f"a piecewise value starts at step {self.piecewise[0][0]}; it must start at step 0")
        return self

    @model_serializer
    def short(self) -> Any:
        """As it was written."""
        if self.constant is not None:
            return self.constant
        word = "linear" if self.linear else "piecewise"
        return {word: [list(knot) for knot in self.linear or self.piecewise]}

    def at(self, step: int) -> Fraction:
        """The value in a step of the stage; decimals are exact, so every machine agrees."""
        if self.constant is not None:
            return _exact(self.constant)
        if self.piecewise:
            return _exact([value for start, value in self.piecewise if start <= step][-1])
        knots = self.linear
        if step <= knots[0][0] or len(knots) == 1:
            return _exact(knots[0][1])
        for (start, low), (end, high) in pairwise(knots):
            if step <= end:
                return _exact(low) + (_exact(high) - _exact(low)) * Fraction(step - start, end - start)
        return _exact(knots[-1][1])

    def total(self, steps: int) -> Fraction:
        """The sum over steps 0 to ``steps`` - 1, in closed form: a position needs no walk."""
        if self.constant is not None:
            return _exact(self.constant) * steps
        corners = sorted({0, steps, *(k for start, _ in self.linear or self.piecewise for k in (start, start + 1))})
        corners = [corner for corner in corners if 0 <= corner <= steps]
        # Between two corners a value is level or straight, so its sum is that of an arithmetic series.
        return sum(
            ((self.at(first) + self.at(last - 1)) * (last - first) / 2 for first, last in pairwise(corners)),
            start=Fraction(0),
        )

    def plus(self, other: StepValue) -> StepValue:
        """The sum of two constants.

        Raises:
            ConfigError: sums of other forms have no short form.
        """
        if self.constant is not None and other.constant is not None:
            return StepValue(constant=self.constant + other.constant)
        raise ConfigError("counts that change with the step cannot be joined where a source falls back on another")

    @property
    def most(self) -> float:
        """The largest value it ever has."""
        return max([self.constant or 0.0, *(value for _, value in (*self.linear, *self.piecewise))])


class Branch(Checked):
    """One branch of a blend: a source, or a blend of its own."""

    source: str | None = None
    blend: tuple[Branch, ...] = ()
    name: str | None = None
    """Name of the subset in figures and perplexity gaps; default the source's."""
    weight: StepValue | None = None
    """Share among the branches beside it (Energon, Megatron)."""
    proportion: StepValue | None = None
    """The same by MosaicML's name."""
    repeat: PositiveFloat | None = None
    """Passes over the branch in one pass of the blend (MosaicML ``repeat``, Energon ``repetitions``)."""
    choose: PositiveInt | None = None
    """Samples of the branch in one pass of the blend (MosaicML)."""
    part: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 1.0)
    """Stretch of the source that is used, as fractions of its numbers (Energon ``subset``)."""

    @model_validator(mode="after")
    def one_thing(self) -> Self:
        """A source or a blend, one word of share, a stretch that is one."""
        if (self.source is None) == (not self.blend):
            raise ConfigError("a branch names either a source or a blend")
        words = [w for w in ("weight", "proportion", "repeat", "choose") if getattr(self, w) is not None]
        if len(words) > 1:
            raise ConfigError(f"branch {self.title!r} has {' and '.join(words)}; one word says its share")
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ConfigError(
                f"branch {self.title!r} takes part {list(self.part)}; name fractions 0 <= first < last <= 1"
            )
        check_siblings(self.blend)
        return self

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or self.source or "+".join(branch.title for branch in self.blend)

    @property
    def share(self) -> StepValue | None:
        """``weight`` or ``proportion``."""
        return self.weight if self.weight is not None else self.proportion

    @property
    def counts(self) -> bool:
        """Whether it speaks in samples of a pass rather than in shares."""
        return self.repeat is not None or self.choose is not None

    def with_sources(self, names: Mapping[str, str]) -> Branch:
        """The same over other sources."""
        source = None if self.source is None else names[self.source]
        blend = tuple(branch.with_sources(names) for branch in self.blend)
        return self.model_copy(update={"source": source, "blend": blend, "name": self.title})

    def leaves(self) -> Iterator[Branch]:
        """Branches that name a source."""
        if self.source is not None:
            yield self
        for branch in self.blend:
            yield from branch.leaves()


class ModalityPart(Checked):
    """What serves one modality, and its share of the tokens."""

    share: StepValue
    """Share of all rows that count as this modality (networks.md section 6)."""
    blend: tuple[Branch, ...]

    @model_validator(mode="after")
    def fits(self) -> Self:
        """Something to draw from."""
        if not self.blend:
            raise ConfigError("a modality needs a blend of at least one branch")
        check_siblings(self.blend)
        return self


class Take(Checked):
    """How much one step takes where no packing says it; exactly one."""

    samples: PositiveInt | None = None
    rows: PositiveInt | None = None
    """Rows of the language sequence at most (one longer sample alone is a step)."""
    cost: PositiveFloat | None = None
    """Cost at most: language rows with the square of attention, and encoder work in the same unit."""

    @model_validator(mode="after")
    def one_amount(self) -> Self:
        """Exactly one."""
        if sum(amount is not None for amount in (self.samples, self.rows, self.cost)) != 1:
            raise ConfigError("take is one of {samples: N}, {rows: N}, {cost: N}")
        return self


class GapConfig(Checked):
    """Weights that follow the perplexity gap of every subset (networks.md section 6)."""

    every_steps: PositiveInt = 100
    """Steps between two measurements."""
    eta: PositiveFloat = 1.0
    """w = w0 exp(eta g), g = max(0, log PPL - reference)."""
    decay: NonNegativeFloat = Field(default=0.9, lt=1)
    """Of the moving average."""
    low: PositiveFloat = Field(default=0.5, le=1)
    high: PositiveFloat = Field(default=3.0, ge=1)
    """A weight stays within [low, high] times its own w0."""
    samples: PositiveInt = 32
    """Validation samples of every subset."""
    split: str = "held_out"
    """Shards that validation samples come from."""
    reference: str | None = None
    """JSON or YAML file {subset: mean log-perplexity of a reference model}, or a checkpoint that is measured when the
    run starts; None = 0 for every subset."""


class Mixture(Checked):
    """What a stage draws from."""

    counts: dict[str, StepValue] | None = None
    """The plain form: samples per step by source; a fraction is met on average, exactly over the stage."""
    blend: tuple[Branch, ...] = ()
    modalities: dict[Literal["text", "vision", "speech"], ModalityPart] = Field(default_factory=dict)
    per: Literal["rows", "samples"] = "rows"
    """What the shares of a blend count; ``repeat`` and ``choose`` always count samples."""
    take: Take | None = None
    gap: GapConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def plain_is_counts(cls, raw: Any) -> Any:
        """A mapping without a word of the language is the plain form."""
        if isinstance(raw, dict) and not any(word in raw for word in _NESTED_WORDS):
            return {"counts": raw}
        return raw

    @model_validator(mode="after")
    def one_form(self) -> Self:
        """Exactly one form, with what it needs."""
        if sum((self.counts is not None, bool(self.blend), bool(self.modalities))) != 1:
            raise ConfigError("a mixture is plain {source: samples}, or has one of blend, modalities")
        for source, value in (self.counts or {}).items():
            if value.most <= 0:
                raise ConfigError(f"source {source!r} has the count 0 at every step; leave it out")
        if self.counts is not None and (self.take or self.gap):
            raise ConfigError("take and gap go with blend or modalities; the plain form says its samples itself")
        check_siblings(self.blend)
        names = [leaf.title for leaf in self.leaves()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if self.gap is not None and twice is not None:
            raise ConfigError(f"two branches are called {twice!r}; gap needs a name for each")
        return self

    @model_serializer(mode="wrap")
    def short(self, handler: Any) -> Any:
        """As it was written."""
        if self.counts is not None:
            return {source: value.short() for source, value in self.counts.items()}
        return {word: value for word, value in handler(self).items() if value not in (None, (), [], {})}

    def leaves(self) -> Iterator[Branch]:
        """Branches that name a source, in order."""
        for source in self.counts or {}:
            yield Branch(source=source)
        for branch in (*self.blend, *(branch for part in self.modalities.values() for branch in part.blend)):
            yield from branch.leaves()

    def with_sources(self, names: Mapping[str, str]) -> Mixture:
        """The nested form over other sources; subsets keep their names."""
        blend = tuple(branch.with_sources(names) for branch in self.blend)
        modalities = {
            word: part.model_copy(update={"blend": tuple(branch.with_sources(names) for branch in part.blend)})
            for word, part in self.modalities.items()
        }
        return self.model_copy(update={"blend": blend, "modalities": modalities})

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources drawn from, each once."""
        return tuple(dict.fromkeys(leaf.source for leaf in self.leaves() if leaf.source is not None))


def check_siblings(branches: tuple[Branch, ...]) -> None:
    """Shares and samples of a pass cannot stand side by side.

    Raises:
        ConfigError: names one of each.
    """
    counting = [branch.title for branch in branches if branch.counts]
    sharing = [branch.title for branch in branches if branch.share is not None]
    if counting and sharing:
        raise ConfigError(
            f"{counting[0]!r} says repeat or choose and {sharing[0]!r} beside it weight or proportion; "
            "put one of them into a blend of its own"
        )
    if not sharing:
        for branch in branches:
            if branch.blend and branch.choose is None and any(child.share is not None for child in branch.blend):
                raise ConfigError(
                    f"blend {branch.title!r} of shares has no length of its own; give it weight or choose"
                )
    if sharing and all(branch.share is not None and branch.share.most <= 0 for branch in branches):
        raise ConfigError(f"every branch beside {sharing[0]!r} has weight 0; give one of them more")


def _exact(value: float) -> Fraction:
    # Weights are written as decimals; Fraction(str) keeps 0.1 exactly a tenth on every machine.
    return Fraction(str(value))
