"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How to answer."""

    voice: bool = False
    """Answer with text and codec rows in parallel instead of text alone."""
    max_tokens: int = 64
    """Most rows of the answer."""
    temperature: float = 0.0
    """0: the likeliest id; above: drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Of the draws; the answer to a request depends on nothing but the request."""
    made_R5: Tensor | None = None
    """[R, 5] rows of this answer that were made before and stand at the end of what was fed; the rest is as if they
    had been made here.  ``max_tokens`` counts those that are still to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(AnswerOptions):
    """One prompt and how to answer it."""

    ids_T5: Tensor
    """[T, 5] int64 prompt rows, ending in the generation prompt; codec rows already filled."""
    features: tuple[tuple[int, Tensor], ...] = ()
    """(first row, [n, H] encoder features) of every media span that is not codec ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One answer."""

    ids_R5: Tensor
    """[R, 5] int64 generated rows, the ending row included."""
    finished: bool
    """True: ended by itself; False: cut at max_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePart:
    """Rows of a session as one engine computed them, for another engine of the same weights."""

    start: int
    """Rows before them."""
    rows_ATX: Tensor
    """[attention slots, T, latent + rotary] of the latent cache."""
    hidden: dict[int, Tensor]
    """Final-normed hidden states [H] inside the part, by the rows before them: an answer can begin there."""

    @property
    def end(self) -> int:
        """Rows of the session up to the last of these."""
        return self.start + self.rows_ATX.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRow:
    """What one step made for one session."""

    ids_5: Tensor
    """Generated ids."""
    ended: bool
    """The answer ended with this row."""
    full: bool
    """The answer reached its limit with this row."""
    hidden_H: Tensor
    """Final-normed hidden state that the row was chosen from."""

    @property
    def last(self) -> bool:
        """No row follows."""
        return self.ended or self.full
