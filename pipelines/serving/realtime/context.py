"""A conversation as blocks of rows, and the difference to what the language stage holds of it.

Blocks never change; editing the conversation means other blocks.  The cache is cut where the two lists part and the
rest is appended, so streaming prefill, rollback, truncation, deletion and a lost replica are one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import OmniConfig
from omni_ray.data.chat import PREFIXES
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, NUM_CODEBOOKS
from pipelines.serving.stages import Rows

ODD_CHUNK_ROWS, EVEN_CHUNK_ROWS = 13, 12
"""Audio rows of a second that has a frame pair before it: 12, 13, 12, 13, ... (docs/networks.md section 5)."""


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that are appended as a whole; compared by identity."""

    rows: Rows
    image: bool = False
    """Its features are those of a picture."""

    def __len__(self) -> int:
        return len(self.rows)


class CacheView:
    """What the language stage holds of a conversation, as the gateway knows it."""

    def __init__(self) -> None:
        self._held: list[tuple[Block, int]] = []

    def lost(self) -> None:
        """The stage holds nothing."""
        self._held = []

    def difference(self, wanted: Sequence[Block]) -> tuple[int, Rows]:
        """Row at which to cut, and what to append there."""
        at, first, inside = 0, 0, 0
        for block, (held, count) in zip(wanted, self._held, strict=False):
            if held is not block:
                break
            at += count
            if count < len(block):
                inside = count
                break
            first += 1
        rest = [block.rows for block in wanted[first:]]
        if inside:
            rest[0] = rest[0].since(inside)
        return at, Rows.joined(rest)

    def now_holds(self, wanted: Sequence[Block]) -> None:
        """The difference was appended."""
        self._held = [(block, len(block)) for block in wanted]

    def holds_part(self, block: Block, count: int) -> None:
        """The stage generated ``block`` after what it held, and keeps ``count`` of its rows."""
        self._held.append((block, count))

    def shortened(self, old: Block, new: Block) -> None:
        """``new`` stands where ``old`` stood and is its beginning."""
        self._held = [(new, min(count, len(new))) if block is old else (block, count) for block, count in self._held]


class Template:
    """The chat template, piece by piece as a turn goes on."""

    def __init__(self, tokenizer: Tokenizer, model: OmniConfig) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.newline = tokenizer.encode("\n")

    def text(self, *pieces: str) -> Block:
        """Text rows."""
        return Block(Rows.of_text([i for piece in pieces for i in self.tokenizer.encode(piece)]))

    def opening(self, role: str) -> Block:
        """``USER:`` and the like."""
        return self.text(PREFIXES[role])

    def answering(self, voice: bool) -> Block:
        """The generation prompt."""
        return self.opening("voice" if voice else "assistant")

    def closing(self, role: str) -> Block:
        """What follows a message."""
        ids = self.newline if role == "user" else [self.tokenizer.eos_id, *self.newline]
        return Block(Rows.of_text(ids))

    def media(
        self, token: int, values_ND: NDArray[np.float32], *, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> Block:
        """Feature rows between text rows."""
        rows = Rows.of_text([*before, *[token] * len(values_ND), *after])
        return Block(Rows(ids_T5=rows.ids_T5, features=((len(before), values_ND),) if len(values_ND) else ()))

    def image(self, values_ND: NDArray[np.float32]) -> Block:
        """A picture."""
        return replace(self.media(self.tokenizer.image_pad_id, values_ND, after=self.newline), image=True)

    def pair(self, values_ND: NDArray[np.float32], time_ms: int) -> Block:
        """A frame pair with its time."""
        stamp = self.tokenizer.encode(f"second{{{time_ms / 1000:.1f}}}:")
        return replace(self.media(self.tokenizer.image_pad_id, values_ND, before=stamp), image=True)

    def answered(self, ids_R5: NDArray[np.int64], ended: bool, voice: bool) -> list[Block]:
        """What follows the generated rows in the history: an end where they were cut, and the newline."""
        blocks = []
        if not ended:
            row_15 = np.full((1, 1 + NUM_CODEBOOKS), AUDIO_PAD, np.int64)
            row_15[0, 0] = self.tokenizer.eos_id
            if voice and len(ids_R5) and ids_R5[-1, 1] not in (AUDIO_EOS, AUDIO_PAD):
                row_15[0, 1] = AUDIO_EOS
            blocks.append(Block(Rows(ids_T5=row_15)))
        return [*blocks, Block(Rows.of_text(self.newline))]


class TurnRows:
    """Orders the rows of a seen and heard turn: pair, twelve rows of sound, pair, thirteen, ...

    Rows come as they become certain; what is given out depends on the order of rows alone, never on when they came.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._sound: list[NDArray[np.float32]] = []
        self._begun = False
        self._chunk = 0
        self._in_chunk = 0
        self._pairs: dict[int, list[Block]] = {}
        self.paired = False

    def copy(self) -> TurnRows:
        """An independent turn that goes on from here (for speculation)."""
        other = TurnRows(self._template)
        other._sound, other._begun = list(self._sound), self._begun
        other._chunk, other._in_chunk = self._chunk, self._in_chunk
        other._pairs, other.paired = dict(self._pairs), self.paired
        return other

    def see(self, chunk: int, block: Block) -> None:
        """A frame pair of second ``chunk`` of the turn; a pair whose second is past goes before the next sound."""
        # Inside a second whose sound has begun, the next sound that a pair can stand before is the next second's.
        next_chunk = self._chunk + (self._in_chunk > 0)
        self._pairs.setdefault(max(chunk, next_chunk), []).append(block)
        self.paired = True

    def hear(self, values_ND: NDArray[np.float32], final: bool = False) -> list[Block]:
        """Blocks that are now in order; ``final`` closes the sound."""
        tokenizer, blocks = self._template.tokenizer, []
        while len(values_ND) or (final and self._pairs):
            blocks += self._pairs.pop(self._chunk, []) if self._in_chunk == 0 else []
            size = ODD_CHUNK_ROWS if self._chunk % 2 else EVEN_CHUNK_ROWS
            part, values_ND = values_ND[: size - self._in_chunk], values_ND[size - self._in_chunk :]
            if len(part):
                before = [] if self._begun else [tokenizer.audio_begin_id]
                self._begun = True
                blocks.append(self._template.media(tokenizer.audio_pad_id, part, before=before))
            self._in_chunk += len(part)
            if self._in_chunk == size or not len(part):
                self._chunk, self._in_chunk = self._chunk + 1, 0
        if final and self._begun:
            blocks.append(Block(Rows.of_text([tokenizer.audio_end_id])))
        return blocks
