"""Conversations that outgrow the model: what is left out, and that nobody else waits for what is read again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest

from pipelines.serving.language_loop import LanguageLoop
from pipelines.serving.realtime.context import Block, Template
from pipelines.serving.realtime.dialogue import RETAINED, Dialogue
from pipelines.serving.realtime.items import Item
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.stages import AnswerOptions, Rows, SessionLostError

POSITIONS, TURN, RESERVE = 1000, 40, 50


def block(rows: int) -> Block:
    return Block(Rows.of_text([20] * rows))


def item(number: int, rows: int = TURN) -> Item:
    return Item(id=f"item_{number}", blocks=[block(rows)])


@pytest.fixture
def dialogue(model_and_stages: Any) -> Dialogue:
    model, stages = model_and_stages
    return Dialogue("s", stages, Template(model.tokenizer, model.config), POSITIONS)


def test_room_is_made_for_many_turns_at_once(dialogue: Dialogue) -> None:
    """The place from which a conversation is kept moves once in several turns, in the middle of none."""
    firsts: list[Block] = []
    for number in range(200):
        tail = [block(TURN // 2)]
        shown = dialogue.history(RESERVE, tail)
        assert dialogue.history(0, tail) == shown, "a turn leaves the room of its answer"
        assert sum(map(len, shown)) + RESERVE <= POSITIONS
        assert shown[-1] is tail[0]
        if len(shown) > 1:
            firsts.append(shown[0])
        dialogue.conversation.items.append(item(number))
    moved = sum(one is not other for one, other in pairwise(firsts))
    turns_of_room = POSITIONS * (1 - RETAINED) / TURN
    assert 200 / turns_of_room * 0.5 < moved < 200 / turns_of_room * 1.6
    kept = sum(len(shown_block) for shown_block in dialogue.history(RESERVE, []))
    assert kept > POSITIONS * RETAINED * 0.8


def test_nothing_is_left_out_while_it_fits_and_deleting_gives_room_back(dialogue: Dialogue) -> None:
    items = [item(number) for number in range(20)]
    dialogue.conversation.items.extend(items)
    assert len(dialogue.history(RESERVE, [])) == 20
    assert len(dialogue.history(RESERVE, [block(300)])) < 20
    left_out = set(dialogue._left_out)
    assert left_out == {one.id for one in items[: len(left_out)]}
    del dialogue.conversation.items[:10]
    dialogue.history(RESERVE, [])
    assert dialogue._left_out == left_out - {one.id for one in items[:10]}, "forgotten with what was deleted"


def test_items_of_another_response_are_cut_to_fit_and_not_remembered(dialogue: Dialogue) -> None:
    dialogue.conversation.items.append(item(0))
    apart = [item(number) for number in range(100, 130)]
    shown = dialogue.history(RESERVE, [], apart)
    assert len(shown) == (POSITIONS - RESERVE) // TURN
    assert dialogue.history(0, []) == dialogue.conversation.items[0].blocks


def test_answers_go_on_while_a_long_prompt_is_read(model_and_stages: Any) -> None:
    """Rows of a running answer come between the pieces, the same as alone; an answer to the long prompt, too."""
    model, _ = model_and_stages
    long, short = Rows.of_text([20] * 3500), Rows.of_text([21, 22, 23])
    options = AnswerOptions(voice=True, max_tokens=60, seed=1)

    async def answered(loop: LanguageLoop, session: str, rows: Rows, most: int = 60) -> list[list[int]]:
        made: list[list[int]] = []
        async with aclosing(loop.answer(session, 0, rows, AnswerOptions(voice=True, max_tokens=most, seed=1))) as parts:
            async for part in parts:
                made += part.ids_R5.tolist()
        return made

    async def main() -> None:
        loop = LanguageLoop(SessionEngine(model.engine))
        alone = await answered(loop, "alone", short)
        long_alone = await answered(loop, "long alone", long, 4)
        during = 0
        reading = asyncio.create_task(loop.extend("reader", 0, long))
        made: list[list[int]] = []
        async with aclosing(loop.answer("speaker", 0, short, options)) as parts:
            async for part in parts:
                during += not reading.done()
                made += part.ids_R5.tolist()
        await reading
        assert made == alone
        assert during > 2, "rows came while the prompt was read"
        assert loop.engine.length("reader") == len(long)
        beside = await asyncio.gather(answered(loop, "speaker", short), answered(loop, "answered", long, 4))
        assert beside == [alone, long_alone]
        await loop.stop()

    asyncio.run(main())


def test_reading_ends_with_its_session(model_and_stages: Any) -> None:
    model, _ = model_and_stages

    async def main() -> None:
        loop = LanguageLoop(SessionEngine(model.engine))
        cut = asyncio.create_task(loop.extend("reader", 0, Rows.of_text([20] * 3500)))
        await asyncio.sleep(0.03)
        loop.forget("reader")
        with pytest.raises(SessionLostError):
            await cut
        await loop.extend("last", 0, Rows.of_text([21]))  # behind what was asked before
        assert len(loop.engine) == 1
        await loop.stop()

    asyncio.run(main())
