"""Named sessions over the language engine: rows appended, cut back and generated, many sessions in one step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni_ray.inference.engine import Engine
from omni_ray.inference.requests import AnswerOptions as EngineOptions
from omni_ray.inference.requests import CachePart
from pipelines.serving.errors import bad_request
from pipelines.serving.stages import AnswerOptions, Rows, SessionLostError

PIECE_ROWS = 128
"""Most rows of one forward: who begins to speak meanwhile has a few rows of sound in hand, not more."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What one step made for one session."""

    row_5: Tensor
    """Generated ids."""
    ended: bool
    """The answer ended with this row."""
    full: bool
    """The answer has reached its limit."""
    logprob: tuple[float, tuple[tuple[int, float], ...]] | None = None
    """Of the text id, and the likeliest alternatives with theirs."""


class SessionEngine:
    """The engine's sessions by the gateway's names; not thread-safe, one loop calls it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.config = engine, engine.config
        self._sessions: dict[str, int] = {}
        self._running: dict[str, AnswerOptions] = {}
        self._used: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def rows(self) -> int:
        """Rows in all caches."""
        return sum(self.engine.length(session) for session in self._sessions.values())

    @property
    def running(self) -> list[str]:
        """Sessions that have an answer in progress."""
        return list(self._running)

    def length(self, session: str) -> int:
        """Rows of a session, 0 for an unknown one."""
        return self.engine.length(self._sessions[session]) if session in self._sessions else 0

    def extend(self, session: str, at: int, rows: Rows) -> None:
        """:meth:`feed`, and read all of it.

        Raises:
            SessionLostError: the session has fewer rows here.  ApiError: more rows than the model has positions.
        """
        self.feed(session, at, rows)
        while self.unread(session):
            self.read(session)

    def unread(self, session: str) -> bool:
        """Whether fed rows wait to be read."""
        return session in self._sessions and self.engine.waiting(self._sessions[session])

    def read(self, session: str) -> None:
        """Read the next piece of what was fed: one forward."""
        self.engine.step([self._sessions[session]], PIECE_ROWS)

    def feed(self, session: str, at: int, rows: Rows) -> None:
        """Cut a session back to ``at`` rows and append others; :meth:`read`, or the steps of its answer, read them.

        Raises:
            SessionLostError: the session has fewer rows here.  ApiError: more rows than the model has positions.
        """
        number = self.cut(session, at)
        if at + len(rows) > self.config.max_position_embeddings:
            raise bad_request(
                f"the conversation takes {at + len(rows)} rows, yet the model has "
                f"{self.config.max_position_embeddings} positions; send less",
                code="context_length_exceeded",
            )
        if not len(rows):
            return
        features = [(offset, torch.from_numpy(np.array(values_ND))) for offset, values_ND in rows.features]
        self.engine.feed(number, torch.from_numpy(np.array(rows.ids_T5)), features)

    def cut(self, session: str, at: int) -> int:
        """Forget the rows of a session from ``at`` on, and its answer in progress; a new session has none.

        Returns:
            The engine's number of it.
        Raises:
            SessionLostError: the session has fewer rows here.
        """
        have = self.length(session)
        if at > have:
            raise SessionLostError(f"session has {have} rows here, not {at}")
        if session not in self._sessions:
            self._sessions[session] = self.engine.open()
        self._used[session] = time.monotonic()
        self._running.pop(session, None)
        self.engine.crop(self._sessions[session], at)
        return self._sessions[session]

    def part(self, session: str, start: int, end: int) -> CachePart:
        """Rows [start, end) of a session, for another engine; its answer in progress ends.

        Raises:
            SessionLostError: the session has fewer rows here.
        """
        self.stop(session)
        if end > self.length(session):
            raise SessionLostError(f"session has {self.length(session)} rows here, not {end}")
        return self.engine.part(self._sessions[session], start, end)

    def take(self, session: str, part: CachePart) -> None:
        """Have another engine's rows from ``part.start`` on; an answer in progress ends.

        Raises:
            SessionLostError: the session has fewer rows here.
        """
        self.engine.take(self.cut(session, part.start), part)

    def start(self, session: str, at: int, rows: Rows, options: AnswerOptions, read: bool = True) -> None:
        """:meth:`extend`, then begin to answer; :meth:`step` makes the rows.

        ``read``: False leaves it to the steps to read what was fed, piece by piece, before they make a row.
        """
        made_R5 = options.made_R5
        if made_R5 is not None:
            rows = Rows.joined([rows, Rows(ids_T5=made_R5)])
        (self.extend if read else self.feed)(session, at, rows)
        room = self.config.max_position_embeddings - self.length(session)
        if room < 1 or self.length(session) == 0:
            raise bad_request("the conversation leaves no room for an answer", code="context_length_exceeded")
        if not self.engine.ready(self._sessions[session]):
            raise SessionLostError(f"no piece of the session ends at row {at}, so no answer can begin there")
        if options.voice and not self.engine.vocabulary.code_sizes:
            raise bad_request("this model has no codec heads; ask for text", param="modalities")
        self.engine.answer(
            self._sessions[session],
            EngineOptions(
                voice=options.voice,
                max_tokens=min(options.max_tokens, room),
                temperature=options.temperature,
                seed=options.seed,
                made_R5=None if made_R5 is None else torch.from_numpy(np.array(made_R5)),
            ),
        )
        self._running[session] = options

    def step(self, sessions: list[str]) -> dict[str, Stepped]:
        """One row for each of these running sessions whose rows are all read; a piece is read of the others."""
        names = {self._sessions[name]: name for name in sessions}
        out = {}
        for number, made in self.engine.step(names, PIECE_ROWS).items():
            name = names[number]
            count = self._running[name].logprobs
            logprob = self.engine.logprob(made, count) if count >= 0 else None
            out[name] = Stepped(made.ids_5, made.ended, made.full, logprob)
            if made.last:
                del self._running[name]
        return out

    def stop(self, session: str) -> None:
        """End an answer in progress; its rows stay."""
        if session in self._sessions:
            self._running.pop(session, None)
            self.engine.cancel(self._sessions[session])

    def forget(self, session: str) -> None:
        """Free a session."""
        self._running.pop(session, None)
        self._used.pop(session, None)
        number = self._sessions.pop(session, None)
        if number is not None:
            self.engine.close(number)

    def sweep(self, unused_s: float) -> None:
        """Free sessions that nobody has asked anything of for so long; an answer in progress is use."""
        before = time.monotonic() - unused_s
        for session in [name for name, used in self._used.items() if used < before and name not in self._running]:
            self.forget(session)
