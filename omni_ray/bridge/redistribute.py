"""Two-stage redistribution inside a data-parallel replica: gather at inner rank 0, split over context ranks, by chunks.

Every encoder rank of the inner group holds a list of whole items.  Chunk after chunk, (i) part c of every rank's list
meets at inner rank 0, and (ii) is cut along the hidden dimension into one slice per context rank, which each keeps at a
known offset.  A micro-batch then selects its items' parts and sorts them into token order.  Gradients take the same way
back.  Where each row lies follows from the lists alone, so every rank computes it and nothing but rows travels.

Memory on inner rank 0: all rows times H at once without chunks, a ``num_chunks``-th of that with them; the store itself
is rows times H / cp at the end.  Source: LongCat-Flash-Omni report, ModalityBridge and Figure 9; networks.md section 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_ray.types.errors import PlanError

Item = tuple[int, int]
"""(id, rows)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """Consecutive rows of one item, and where they lie."""

    item: int
    """Its id."""
    start: int
    """First row inside the item."""
    rows: int
    """How many."""
    sender: int
    """Encoder rank of the inner group that made them."""
    chunk: int
    """Piece in which they travel."""
    offset: int
    """First row in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeLayout:
    """Where every row of an inner group's items lies after redistribution."""

    lists: tuple[tuple[Item, ...], ...]
    """Items of every encoder rank, in the order in which it holds them; empty ranks are normal."""
    num_chunks: int
    """Pieces in which the lists travel."""
    parts: tuple[StoredPart, ...]
    """In store order: by chunk, then by sender, then as listed."""

    @staticmethod
    def of(lists: Sequence[Sequence[Item]], num_chunks: int) -> BridgeLayout:
        """Lay out the rows.

        Raises:
            PlanError: an item stands in two lists, or ``num_chunks`` is below 1.
        """
        if num_chunks < 1:
            raise PlanError(f"num_chunks is {num_chunks}; choose 1 or more")
        seen: dict[int, int] = {}
        for sender, items in enumerate(lists):
            for item, _ in items:
                if item in seen:
                    raise PlanError(
                        f"item {item} stands in the lists of ranks {seen[item]} and {sender}; encode it once"
                    )
                seen[item] = sender
        parts: list[StoredPart] = []
        offset = 0
        for chunk in range(num_chunks):
            for sender, items in enumerate(lists):
                for item, start, rows in _cut(items, chunk, num_chunks):
                    parts.append(
                        StoredPart(item=item, start=start, rows=rows, sender=sender, chunk=chunk, offset=offset)
                    )
                    offset += rows
        return BridgeLayout(lists=tuple(tuple(items) for items in lists), num_chunks=num_chunks, parts=tuple(parts))

    @property
    def rows(self) -> int:
        """Rows of the whole store."""
        return sum(rows for items in self.lists for _, rows in items)

    def chunk_rows(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk in the store, and the row after its last."""
        before = sum(part.rows for part in self.parts if part.chunk < chunk)
        return before, before + sum(part.rows for part in self.parts if part.chunk == chunk)

    def sender_rows(self, sender: int, chunk: int) -> tuple[int, int]:
        """Rows of a sender's own list that travel in a chunk: first, and the one after the last."""
        total = sum(rows for _, rows in self.lists[sender])
        return total * chunk // self.num_chunks, total * (chunk + 1) // self.num_chunks

    def select(self, items: Sequence[int]) -> list[StoredPart]:
        """Parts of a micro-batch's items in token order: as the items are given, rows ascending.

        Raises:
            PlanError: an item that no rank holds.
        """
        found: dict[int, list[StoredPart]] = {item: [] for item in items}
        for part in self.parts:
            if part.item in found:
                found[part.item].append(part)
        for item, parts in found.items():
            if not parts:
                raise PlanError(f"item {item} is asked for, yet no rank of the inner group holds it")
        return [part for item in items for part in sorted(found[item], key=lambda part: part.start)]


def _cut(items: Sequence[Item], chunk: int, num_chunks: int) -> Iterator[tuple[int, int, int]]:
    total = sum(rows for _, rows in items)
    first, last = total * chunk // num_chunks, total * (chunk + 1) // num_chunks
    row = 0
    for item, rows in items:
        low, high = max(first, row), min(last, row + rows)
        if high > low:
            yield item, low - row, high - low
        row += rows


class ContextStore:
    """One context rank's slice of all rows of the inner group, and of their gradients."""

    def __init__(self, layout: BridgeLayout, width: int, like: Tensor) -> None:
        self.layout = layout
        self.values_IH = like.new_zeros(layout.rows, width)
        """[rows, H / cp] features in store order."""
        self.gradient_IH: Tensor | None = None
        """[rows, H / cp]; zeros where no micro-batch has written."""

    def write(self, chunk: int, slice_IH: Tensor) -> None:
        """Keep this rank's slice of a chunk."""
        first, last = self.layout.chunk_rows(chunk)
        self.values_IH[first:last] = slice_IH

    def read(self, items: Sequence[int]) -> Tensor:
        """This rank's slice of a micro-batch's rows, in token order."""
        parts = self.layout.select(items)
        return torch.cat([self.values_IH[p.offset : p.offset + p.rows] for p in parts]) if parts else self.values_IH[:0]

    def write_gradient(self, items: Sequence[int], gradient_IH: Tensor) -> None:
        """Store the gradient of what :meth:`read` gave for the same items."""
        if self.gradient_IH is None:
            self.gradient_IH = torch.zeros_like(self.values_IH)
        start = 0
        for part in self.layout.select(items):
            self.gradient_IH[part.offset : part.offset + part.rows] = gradient_IH[start : start + part.rows]
            start += part.rows

    def read_gradient(self, chunk: int) -> Tensor:
        """This rank's slice of a chunk's gradient."""
        first, last = self.layout.chunk_rows(chunk)
        return (
            self.values_IH.new_zeros(last - first, self.values_IH.shape[1])
            if self.gradient_IH is None
            else (self.gradient_IH[first:last])
        )


def aggregate(layout: BridgeLayout, chunk: int, pieces: Sequence[Tensor], buffer_ID: Tensor | None = None) -> Tensor:
    """Stage (i): the senders' parts of a chunk, one under another.

    Args:
        pieces: One [n, H] tensor per sender (n may be 0), in sender order.
        buffer_ID: Memory to use again, at least as many rows as the largest chunk.

    Raises:
        PlanError: a piece has other rows than the layout says, or the senders disagree on the hidden size.
    """
    widths = {piece.shape[1] for piece in pieces if piece.shape[0]}
    if len(widths) > 1:
        raise PlanError(
            f"the encoder ranks send features {sorted(widths)} wide; set every projector's output_size alike"
        )
    first, last = layout.chunk_rows(chunk)
    width = widths.pop() if widths else pieces[0].shape[1]
    out_ID = pieces[0].new_empty(last - first, width) if buffer_ID is None else buffer_ID[: last - first]
    row = 0
    for sender, piece in enumerate(pieces):
        low, high = layout.sender_rows(sender, chunk)
        if piece.shape[0] != high - low:
            raise PlanError(f"rank {sender} sent {piece.shape[0]} rows in chunk {chunk}, the layout has {high - low}")
        out_ID[row : row + piece.shape[0]] = piece
        row += piece.shape[0]
    return out_ID


def slices(rows_ID: Tensor, cp: int) -> list[Tensor]:
    """Stage (ii): equal slices along the hidden dimension, one per context rank.

    Raises:
        PlanError: the hidden size is no multiple of cp.
    """
    if rows_ID.shape[1] % cp:
        raise PlanError(f"hidden size {rows_ID.shape[1]} cannot be cut over cp {cp}; choose a divisor")
    return list(rows_ID.chunk(cp, dim=1))


def gather_hidden(parts: Sequence[Tensor]) -> Tensor:
    """The all-gather over context ranks: slices side by side."""
    return torch.cat(list(parts), dim=1)


def scatter_back(layout: BridgeLayout, chunk: int, gradient_ID: Tensor) -> list[Tensor]:
    """The adjoint of :func:`aggregate`: each sender's rows of a chunk's gradient."""
    out, row = [], 0
    for sender in range(len(layout.lists)):
        low, high = layout.sender_rows(sender, chunk)
        out.append(gradient_ID[row : row + high - low])
        row += high - low
    return out


def redistribute(layout: BridgeLayout, rows: Sequence[Tensor], cp: int) -> list[ContextStore]:
    """The whole way forward in one process: a simulated inner group.

    Args:
        rows: Per encoder rank the [n, H] features of its list.  cp: Context ranks.
    """
    stores = [ContextStore(layout, rows[0].shape[1] // cp, rows[0]) for _ in range(cp)]
    for chunk in range(layout.num_chunks):
        pieces = [r[slice(*layout.sender_rows(sender, chunk))] for sender, r in enumerate(rows)]
        for store, part_IH in zip(stores, slices(aggregate(layout, chunk, pieces), cp), strict=True):
            store.write(chunk, part_IH)
    return stores


def redistribute_back(layout: BridgeLayout, stores: Sequence[ContextStore]) -> list[Tensor]:
    """The whole way back in one process: per encoder rank the gradient of its list's rows."""
    back: list[list[Tensor]] = [[] for _ in layout.lists]
    for chunk in range(layout.num_chunks):
        gradient_ID = gather_hidden([store.read_gradient(chunk) for store in stores])
        for sender, piece in enumerate(scatter_back(layout, chunk, gradient_ID)):
            back[sender].append(piece)
    return [torch.cat(pieces) for pieces in back]
