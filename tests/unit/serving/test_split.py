"""Prompts read by one engine and answers made by another: the rows of one engine that does both, computed once."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import SHORT, Client, open_client, room, settled, voiced

from omni_ray.inference.engine import Engine
from omni_ray.inference.omni_model import load_model
from pipelines.serving.language_loop import LanguageLoop
from pipelines.serving.local_stages import LocalStages
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.split import Split
from pipelines.serving.stages import AnswerOptions, AnswerRows, Rows, SessionLostError

WORDS = "USER:which digit is it, say blue two and red seven\nVOICE ASSISTANT:"


class TwoLoops:
    """The two ends in one process; what goes between them is an awaitable, as it is between replicas."""

    def __init__(self, model: Any) -> None:
        self.loops = {
            end: LanguageLoop(SessionEngine(Engine(model.language, model.engine.vocabulary)))
            for end in ("prefill", "language")
        }
        self.handed = 0

    async def read(self, session: str, at: int, rows: Rows) -> None:
        await self.loops["prefill"].extend(session, at, rows)

    def part(self, end: str, session: str, start: int, stop: int) -> Any:
        return self.loops[end].part(session, start, stop)

    async def take(self, session: str, part: Any) -> None:
        await self.loops["prefill"].take(session, self._counted(await part))

    async def make(self, session: str, part: Any, at: int, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        await self.loops["language"].take(session, self._counted(await part))
        async with aclosing(self.loops["language"].answer(session, at, Rows.of_text([]), options)) as parts:
            async for made in parts:
                yield made

    def _counted(self, part: Any) -> Any:
        self.handed += part.rows_ATX.shape[1]
        return part

    def forget(self, session: str) -> None:
        for loop in self.loops.values():
            loop.forget(session)

    async def pages(self) -> list[int]:
        """Held by each engine, after what was asked before."""
        for loop in self.loops.values():
            await loop._call(lambda: None)
        return [loop.engine.engine.cache.pages_held for loop in self.loops.values()]

    async def stop(self) -> None:
        for loop in self.loops.values():
            await loop.stop()


class SplitStages(LocalStages):
    """All stages in one process, with two language engines."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.ends = TwoLoops(model)
        self.split = Split(self.ends)  # type: ignore[arg-type]

    async def extend(self, session: str, at: int, rows: Rows) -> None:
        await self.split.extend(session, at, rows)

    def answer(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> AsyncIterator[AnswerRows]:
        return self.split.answer(session, at, rows, options)

    def forget(self, session: str) -> None:
        super().forget(session)
        self.split.forget(session)
        self.ends.forget(session)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    torch.set_num_threads(1)
    return load_model(tiny_checkpoint)


def prompt(model: Any, length: int) -> Rows:
    ids = model.tokenizer.encode(WORDS)
    return Rows.of_text((ids * (length // len(ids) + 1))[:length])


async def rows_of(parts: AsyncIterator[AnswerRows], most: int = 1 << 30) -> list[list[int]]:
    made: list[list[int]] = []
    async with aclosing(parts) as open_parts:  # type: ignore[type-var]
        async for part in open_parts:
            made += part.ids_R5.tolist()
            if len(made) >= most:
                break
    return made


async def conversation(stages: Any, model: Any, seed: int) -> list[list[list[int]]]:
    """Turns of random lengths: pieces, cuts back into prompts and answers, interrupted answers."""
    rng = np.random.default_rng(seed)
    at, answers = 0, []
    for turn in range(5):
        for _ in range(int(rng.integers(0, 3))):
            piece = prompt(model, int(rng.integers(1, 90)))
            await stages.extend("s", at, piece)
            at += len(piece)
            if rng.random() < 0.4:
                at = int(rng.integers(0, at + 1))
        last, most = prompt(model, int(rng.integers(1, 40))), int(rng.integers(2, 12))
        options = AnswerOptions(voice=bool(rng.random() < 0.6), max_tokens=most, temperature=0.8, seed=turn)
        made = await rows_of(stages.answer("s", at, last, options))
        answers.append(made)
        # The answer's last row was not run; the next turn feeds it, or cuts the answer short.
        at += len(last) + int(rng.integers(0, len(made)))
    return answers


def test_conversations_have_the_rows_of_one_engine_and_no_row_is_computed_twice(model: Any) -> None:
    async def work() -> None:
        for seed in range(6):
            together, ends = LanguageLoop(SessionEngine(model.engine)), TwoLoops(model)
            split = Split(ends)  # type: ignore[arg-type]
            fed: list[int] = []
            engine = ends.loops["language"].engine.engine
            plain = engine.feed
            engine.feed = lambda *a, plain=plain, fed=fed: (fed.append(len(a[1])), plain(*a))[1]  # type: ignore[method-assign]
            expected = await conversation(together, model, seed)
            assert await conversation(split, model, seed) == expected
            assert fed == []  # the making stage reads no prompt
            assert ends.handed > 0
            ends.forget("s")
            together.forget("s")
            assert await ends.pages() == [0, 0]
            await ends.stop()
            await together.stop()

    asyncio.run(work())


def test_a_part_is_the_rows_bit_for_bit_and_refuses_what_is_not_there(model: Any) -> None:
    one, other = (SessionEngine(Engine(model.language, model.engine.vocabulary)) for _ in range(2))
    one.extend("s", 0, prompt(model, 150))
    part = one.part("s", 0, 150)
    other.take("s", part)
    again = other.part("s", 70, 150)
    assert torch.equal(again.rows_ATX, part.rows_ATX[:, 70:])
    assert torch.equal(again.hidden[150], part.hidden[150])
    with pytest.raises(SessionLostError, match="150 rows here, not 151"):
        one.part("s", 0, 151)
    with pytest.raises(SessionLostError):
        other.take("another", again)  # begins at row 70 of a session that has none
    with pytest.raises(ValueError, match="this model's are"):
        other.engine.take(other._sessions["s"], type(part)(start=0, rows_ATX=part.rows_ATX[:1], hidden={}))


@pytest.mark.parametrize("lost", ["prefill", "language"])
def test_a_lost_stage_is_told_and_everything_can_be_given_again(model: Any, lost: str) -> None:
    async def work() -> None:
        together, ends = LanguageLoop(SessionEngine(model.engine)), TwoLoops(model)
        split = Split(ends)  # type: ignore[arg-type]
        first, then = prompt(model, 60), prompt(model, 75)
        options = AnswerOptions(voice=True, max_tokens=6)
        made = await rows_of(split.answer("s", 0, first, options))
        ends.loops[lost].forget("s")
        with pytest.raises(SessionLostError):
            await rows_of(split.answer("s", 60 + len(made) - 1, then, options))
        whole = Rows.joined([first, Rows(ids_T5=np.array(made[:-1])), then])
        again = await rows_of(split.answer("s", 0, whole, options))
        assert again == await rows_of(together.answer("s", 0, whole, options))
        together.forget("s")
        await ends.stop()
        await together.stop()

    asyncio.run(work())


def test_a_spoken_conversation_sounds_the_same(model: Any) -> None:
    """Streaming prefill, a rollback, two turns: every byte that the client hears."""

    async def talk(stages: Any) -> bytes:
        client: Client = await open_client(stages, model)
        await client.send("session.update", session=SHORT)
        for turn in range(2):
            await client.say(room(0.3), voiced(1.4), room(0.4), voiced(0.7))
            await settled(client)
            await client.say(room(0.8))
            await client.wait("response.done", turn + 1)
            await settled(client)
            client.session.turns.spoken()
        heard = b"".join(base64.b64decode(event["delta"]) for event in client.of("response.output_audio.delta"))
        await client.close()
        return heard

    async def work() -> None:
        stages = [LocalStages(model), SplitStages(model)]
        heard = [await talk(each) for each in stages]
        assert heard[0] == heard[1] != b""
        await asyncio.sleep(0)
        assert await stages[1].ends.pages() == [0, 0]  # type: ignore[attr-defined]
        await stages[1].ends.stop()  # type: ignore[attr-defined]
        for each in stages:
            await each.close()

    asyncio.run(work())
