"""The engine: sessions over the latent cache; prompt pieces and decoded rows of all of them share one forward.

An answer depends on its session's rows and its options alone, bit for bit in fp32 on CPU: not on who shares a step, nor
on how the prompt was cut, nor on whether it was cropped and fed again (docs/decisions, 0012).
"""

# T prompt rows, B answers in progress, S spans of a forward, H model dim

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omni_ray.inference.cache import PAGE_ROWS, LatentCache
from omni_ray.inference.native.forward import forward_of
from omni_ray.inference.prefix import PrefixStore, page_keys
from omni_ray.inference.prompt_rows import check_rows
from omni_ray.inference.requests import AnswerOptions, CachePart, Generation, GenerationRequest, MadeRow
from omni_ray.inference.row_weights import fingerprint, product
from omni_ray.inference.rows import RowSampler, Vocabulary
from omni_ray.models.llm import LanguageModel
from omni_ray.types.errors import RequestError, ResourceError

STEP_ROWS = 512
"""Most rows of one forward: decoded ones first, prompt pieces in what is left."""
TOGETHER = 64
"""Answers in progress at once in :meth:`Engine.generate`; the next begins when one ends."""


@dataclass(eq=False, slots=True)
class _Session:
    sequence: int
    tenant: str
    queue: deque[Tensor] = field(default_factory=deque)
    """Embedded rows that wait for a forward."""
    queued: int = 0
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Final-normed hidden state at the end of every fed piece, by the rows before it: an answer can begin there."""
    answer: AnswerOptions | None = None
    made: int = 0
    keys: list[bytes] = field(default_factory=list)
    """Of the whole pages of the first piece."""


class Engine:
    """Continuous batching over sessions of one language model; not thread-safe."""

    def __init__(
        self, model: LanguageModel, vocabulary: Vocabulary, *, max_pages: int | None = None, prefix_pages: int = 0
    ) -> None:
        """Nothing is copied before the first session.

        Args:
            model: Its weights may change between calls; the engine follows when the next session opens.
            vocabulary: Which ids an answer may hold.
            max_pages: Most cache pages of 64 rows; None: as many as memory holds.
            prefix_pages: Pages of finished prompts kept for later ones that begin alike.
        """
        self.model, self.vocabulary = model, vocabulary
        self.config = model.config
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.cache = LatentCache(self.config, max_pages=max_pages, dtype=weight.dtype, device=str(weight.device))
        self.prefixes = PrefixStore(self.cache, prefix_pages)
        self._sampler = RowSampler(vocabulary, self.config.vocab_size, self.config.codec_vocab_size, self.device)
        self._sessions: dict[int, _Session] = {}
        self._answering: list[int] = []
        self._seen: tuple[object, ...] = ()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answer all requests, in their order.

        Raises:
            RequestError: an empty prompt, no room to answer, or features that do not fit their rows.
        """
        for request in requests:
            check_rows(self.config, request.ids_T5, request.features, 0)
            self._check_answer(len(request.ids_T5), request)
        waiting = deque(enumerate(requests))
        rows: list[list[Tensor]] = [[] for _ in requests]
        finished = [False] * len(requests)
        going: dict[int, int] = {}
        try:
            while waiting or going:
                while waiting and len(going) < TOGETHER:
                    index, request = waiting.popleft()
                    session = self.open()
                    going[session] = index
                    self.feed(session, request.ids_T5, request.features)
                    self.answer(session, request)
                for session, made in self.step(going).items():
                    rows[going[session]].append(made.ids_5)
                    if made.last:
                        finished[going.pop(session)] = made.ended
                        self.close(session)
        finally:
            for session in going:
                self.close(session)
        return [
            Generation(ids_R5=torch.stack(answer), finished=done) for answer, done in zip(rows, finished, strict=True)
        ]

    def prefill(self, requests: Sequence[GenerationRequest]) -> tuple[list[int], Tensor]:
        """Open a session for each prompt and run it.

        Returns:
            The sessions, and [B, H]: the final-normed hidden state of each last row.
        """
        sessions = [self.open() for _ in requests]
        for session, request in zip(sessions, requests, strict=True):
            self.feed(session, request.ids_T5, request.features)
        while any(self._sessions[session].queue for session in sessions):
            self.step(sessions)
        return sessions, torch.stack([self.hidden(session) for session in sessions])

    def open(self, tenant: str = "") -> int:
        """A new empty session; prefixes are shared inside a tenant only."""
        seen = fingerprint(self.model)
        if seen != self._seen:
            self.prefixes.clear()
            self._forward = forward_of(self.model, self.cache)
            self._seen = seen
        session = self.cache.open()
        self._sessions[session] = _Session(session, tenant)
        return session

    def close(self, session: int) -> None:
        """Free a session's pages, whatever it was doing."""
        self.cancel(session)
        del self._sessions[session]
        self.cache.close(session)

    def fork(self, session: int) -> int:
        """A session with the same rows, sharing their pages; a waiting piece or answer is not taken along."""
        entry, other = self._sessions[session], self.cache.fork(session)
        self._sessions[other] = _Session(other, entry.tenant, hidden=dict(entry.hidden))
        return other

    @property
    def sessions(self) -> tuple[int, ...]:
        """Open sessions."""
        return tuple(self._sessions)

    def length(self, session: int) -> int:
        """Rows of a session, those that wait for a forward included."""
        return self.cache.length(session) + self._sessions[session].queued

    def waiting(self, session: int) -> bool:
        """Whether fed rows wait for a forward."""
        return bool(self._sessions[session].queue)

    def ready(self, session: int) -> bool:
        """Whether an answer can begin at the last row: a fed piece ends there and has been run, or will be."""
        entry = self._sessions[session]
        return bool(entry.queue) or self.cache.length(session) in entry.hidden

    def hidden(self, session: int) -> Tensor:
        """[H] final-normed hidden state of the last row, which an answer begins from.

        Raises:
            RequestError: no piece ends there (nothing fed, or cropped into the middle of one).
        """
        length = self.cache.length(session)
        found = self._sessions[session].hidden.get(length)
        if found is None:
            raise RequestError(f"no fed piece ends at row {length}, so no answer can begin there; feed a row first")
        return found

    def feed(self, session: int, ids_T5: Tensor, features: Sequence[tuple[int, Tensor]] = ()) -> None:
        """Append prompt rows; the next steps run them, in pieces beside other sessions' rows.

        Args:
            session: Without an answer in progress.
            ids_T5: [T, 5] rows, codec rows filled.
            features: (first row, [n, H]) of every media span, rows counted from the first of these.
        Raises:
            RequestError: rows or features that do not fit.  ResourceError: not enough cache pages are free.
        """
        entry = self._sessions[session]
        if entry.answer is not None:
            raise RequestError(f"session {session} is answering; cancel the answer or wait for its end before feeding")
        check_rows(self.config, ids_T5, features, self.length(session))
        self._admit(session, len(ids_T5))
        ids_T5 = ids_T5.to(self.device)
        with torch.no_grad():
            x_TH = self.model.embed_rows(ids_T5)
            for offset, values_NH in features:
                x_TH[offset : offset + len(values_NH)] = values_NH.to(x_TH)
        if self.prefixes.max_pages and self.length(session) == 0:
            entry.keys = page_keys(ids_T5, features, entry.tenant)
            # One row at least is computed, for its hidden state.
            pages = self.prefixes.match(entry.keys[: (len(ids_T5) - 1) // PAGE_ROWS])
            self.cache.adopt(session, pages, len(pages) * PAGE_ROWS)
            x_TH = x_TH[len(pages) * PAGE_ROWS :]
        entry.queue.append(x_TH)
        entry.queued += len(x_TH)

    def answer(self, session: int, options: AnswerOptions) -> None:
        """Begin to answer; :meth:`step` makes the rows, after those that still wait.

        Raises:
            RequestError: no room, or an answer is in progress.  ResourceError: not enough cache pages are free.
        """
        entry = self._sessions[session]
        if entry.answer is not None:
            raise RequestError(f"session {session} is answering already; cancel that answer first")
        self._check_answer(self.length(session), options)
        if not entry.queue:
            self.hidden(session)
        self._admit(session, options.max_tokens)
        entry.answer, entry.made = options, 0
        self._answering.append(session)
        self._sampler.add(options)

    def cancel(self, session: int) -> None:
        """End an answer in progress and drop rows that wait; rows that were run stay."""
        entry = self._sessions[session]
        entry.queue.clear()
        entry.queued = 0
        if entry.answer is not None:
            self._end([session])

    def crop(self, session: int, rows: int) -> None:
        """Forget a session's rows from ``rows`` on, and whatever it was doing.

        Raises:
            ValueError: fewer rows were run.
        """
        self.cancel(session)
        self.cache.crop(session, rows)
        entry = self._sessions[session]
        entry.hidden = {length: hidden for length, hidden in entry.hidden.items() if length <= rows}
        entry.keys = entry.keys[: rows // PAGE_ROWS]

    @torch.inference_mode()
    def part(self, session: int, start: int, end: int) -> CachePart:
        """Copy of rows [start, end), all of them run; what :meth:`take` takes in another engine of the same weights.

        Raises:
            ValueError: fewer rows were run.
        """
        entry, have = self._sessions[session], self.cache.length(session)
        if not 0 <= start <= end <= have:
            raise ValueError(f"session {session} has {have} rows; [{start}, {end}) are not among them")
        hidden = {length: hidden for length, hidden in entry.hidden.items() if start < length <= end}
        return CachePart(start=start, rows_ATX=self.cache.read(session, start, end), hidden=hidden)

    @torch.inference_mode()
    def take(self, session: int, part: CachePart) -> None:
        """Replace a session's rows from ``part.start`` on by another engine's; whatever it was doing ends.

        Raises:
            ValueError: the session has fewer rows, or the rows have another size.  ResourceError: too few free pages.
        """
        want = (self.cache.slots, part.rows_ATX.shape[1], self.cache.width)
        if tuple(part.rows_ATX.shape) != want:
            raise ValueError(f"rows have shape {list(part.rows_ATX.shape)}, this model's are {list(want)}")
        self.crop(session, part.start)
        self._admit(session, part.end - part.start)
        self.cache.write_all(session, part.rows_ATX)
        self._sessions[session].hidden |= {length: hidden.to(self.device) for length, hidden in part.hidden.items()}

    @torch.inference_mode()
    def step(self, sessions: Iterable[int] | None = None, most_rows: int = STEP_ROWS) -> dict[int, MadeRow]:
        """Choose one row for every answer whose prompt has been run, then run these rows and pieces of prompts.

        Args:
            sessions: Only these; None: all.
            most_rows: Of the forward; fewer let it end sooner, and no result depends on it.
        Returns:
            The row of every session that made one.  An answer's last row is not run: feed it with the next turn.
        """
        wanted = list(self._sessions if sessions is None else sessions)
        made, ids_B5 = self._choose(set(wanted))
        going = [(session, place) for place, session in enumerate(made) if not made[session].last]
        spans = [(session, 1) for session, _ in going]
        parts = []
        if going and ids_B5 is not None:
            all_go = len(going) == len(made)
            parts.append(self._embed(ids_B5 if all_go else ids_B5[[place for _, place in going]]))
        room = most_rows - len(spans)
        for session in wanted:
            room -= self._take_piece(session, room, spans, parts)
        if spans:
            last_SH = self._forward.advance(parts[0] if len(parts) == 1 else torch.cat(parts), spans)
            for (session, _), hidden_H in zip(spans, last_SH.unbind(0), strict=True):
                self._arrived(session, hidden_H)
        self._end([session for session, row in made.items() if row.last])
        return made

    @torch.inference_mode()
    def logprob(self, made: MadeRow, alternatives: int = 0) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Log-probability of a row's text id under the model's own distribution, and the likeliest ids with theirs."""
        hidden_2H = torch.stack([made.hidden_H, made.hidden_H])
        logprobs_V = product(hidden_2H, self._forward.weights.text_head)[0].float().log_softmax(dim=-1)
        best = logprobs_V.topk(alternatives) if alternatives else None
        pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return float(logprobs_V[int(made.ids_5[0])]), pairs

    def _choose(self, wanted: set[int]) -> tuple[dict[int, MadeRow], Tensor | None]:
        places = [
            place
            for place, session in enumerate(self._answering)
            if session in wanted and not self._sessions[session].queue
        ]
        if not places:
            return {}, None
        sessions = [self._answering[place] for place in places]
        hidden_BH = torch.stack([self.hidden(session) for session in sessions])
        part = None if len(places) == len(self._answering) else places
        ids_B5, ended_B = self._sampler.next_rows(hidden_BH, self._forward.weights, part)
        made = {}
        for session, ids_5, ended, hidden_H in zip(
            sessions, ids_B5.cpu().unbind(0), ended_B.tolist(), hidden_BH.unbind(0), strict=True
        ):
            entry = self._sessions[session]
            assert entry.answer is not None
            entry.made += 1
            full = entry.made >= entry.answer.max_tokens
            made[session] = MadeRow(ids_5=ids_5, ended=ended, full=full, hidden_H=hidden_H)
        return made, ids_B5

    def _embed(self, ids_B5: Tensor) -> Tensor:
        if not self._sampler.any_voice:
            return self.model.model.embed_tokens.weight.index_select(0, ids_B5[:, 0])
        return self.model.embed_rows(ids_B5)

    def _take_piece(self, session: int, room: int, spans: list[tuple[int, int]], parts: list[Tensor]) -> int:
        """Move up to ``room`` waiting rows of one fed piece into the forward; how many."""
        entry = self._sessions[session]
        if not entry.queue or room <= 0:
            return 0
        piece_TH = entry.queue.popleft()
        if len(piece_TH) > room:
            entry.queue.appendleft(piece_TH[room:])
            piece_TH = piece_TH[:room]
        entry.queued -= len(piece_TH)
        spans.append((session, len(piece_TH)))
        parts.append(piece_TH)
        return len(piece_TH)

    def _arrived(self, session: int, hidden_H: Tensor) -> None:
        entry, length = self._sessions[session], self.cache.length(session)
        if entry.answer is not None and entry.made > 1:
            # Inside an answer only the newest is of use; ends of pieces stay, to crop back to.
            entry.hidden.pop(length - 1, None)
        entry.hidden[length] = hidden_H
        if entry.keys:
            for place, key in enumerate(entry.keys[: length // PAGE_ROWS]):
                self.prefixes.keep(key, self.cache.pages(session)[place])
            if length // PAGE_ROWS >= len(entry.keys):
                entry.keys = []

    def _end(self, sessions: Sequence[int]) -> None:
        if not sessions:
            return
        for session in sessions:
            self._sessions[session].answer = None
        kept = [place for place, session in enumerate(self._answering) if session not in set(sessions)]
        self._answering = [self._answering[place] for place in kept]
        self._sampler.keep(kept)

    def _admit(self, session: int, rows: int) -> None:
        """Refuse before anything runs, so that an answer once begun never lacks a page."""
        limit = self.cache.max_pages
        if limit is None:
            return
        needed = 0
        for name, entry in self._sessions.items():
            left = entry.answer.max_tokens - entry.made if entry.answer is not None else 0
            total = self.length(name) + left + (rows if name == session else 0)
            # One page more than it fills: its own copy of a shared one.
            needed += -(-total // PAGE_ROWS) + 1 if total else 0
        while needed + len(self.prefixes) > limit and self.prefixes.drop():
            pass
        if needed > limit:
            raise ResourceError(
                f"{rows} more rows would take the latent cache to {needed} pages of {PAGE_ROWS} rows, yet it has "
                f"{limit}; close sessions, ask for fewer tokens, or allow more pages"
            )

    def _check_answer(self, rows: int, options: AnswerOptions) -> None:
        room = self.config.max_position_embeddings - rows
        if options.max_tokens < 1 or options.max_tokens > room:
            raise RequestError(
                f"max_tokens is {options.max_tokens} after a prompt of {rows} rows, yet the model has "
                f"{self.config.max_position_embeddings} positions; choose 1..{max(room, 0)}"
            )
        if options.voice and not self.vocabulary.code_sizes:
            raise RequestError("this model has no codec heads, so it cannot answer in speech; ask with voice=False")
