"""Replicas that are lost in the middle of a turn or an answer: the client hears every byte that it would have heard."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from live import SHORT, Client, Talk, generated, png, room, run, settled, voiced

from omni_ray.types.modality import FEATURE_MODALITIES
from pipelines.serving.chat_turn import ChatTurn
from pipelines.serving.errors import ApiError
from pipelines.serving.local_stages import LocalStages
from pipelines.serving.prompt import Prompt, PromptRows
from pipelines.serving.stages import AnswerOptions, Rows, SessionLostError


class Losing:
    """Stages that lose what they hold before chosen calls, as when another replica takes over."""

    def __init__(self, stages: Any, losses: dict[str, set[int]]) -> None:
        """``losses``: numbers, from 0, of the calls (for ``answer``: of the rows) of a method that fail."""
        self._stages, self._losses, self._seen = stages, losses, dict.fromkeys(losses, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)

    def _lose(self, name: str, forget: Any, session: str) -> None:
        number, self._seen[name] = self._seen.get(name, 0), self._seen.get(name, 0) + 1
        if number in self._losses.get(name, ()):
            forget(session)
            raise SessionLostError("the replica is gone")

    async def encode(self, *given: Any) -> Any:
        self._lose("encode", lambda _: None, "")
        return await self._stages.encode(*given)

    async def hear(self, session: str, *given: Any) -> Any:
        self._lose("hear", self._stages.ears.forget, session)
        return await self._stages.hear(session, *given)

    async def say(self, session: str, *given: Any) -> Any:
        self._lose("say", self._stages.mouth.forget, session)
        return await self._stages.say(session, *given)

    async def extend(self, session: str, *given: Any) -> Any:
        self._lose("extend", self._stages.language.forget, session)
        return await self._stages.extend(session, *given)

    async def answer(self, session: str, at: int, rows: Any, options: AnswerOptions) -> AsyncIterator[Any]:
        async with aclosing(self._stages.answer(session, at, rows, options)) as parts:
            async for part in parts:
                yield part
                self._lose("answer", self._stages.language.forget, session)


def spoken_turn() -> Talk:
    """A picture, then a question of two seconds, answered aloud."""

    async def go(client: Client) -> None:
        await client.send("session.update", session=SHORT)
        content = [{"type": "input_image", "image_url": png()}]
        await client.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        await client.say(room(0.4), voiced(2.4))
        await settled(client)
        await client.say(room(0.8))
        await client.wait("response.done")
        await settled(client)

    return go


def sound(client: Client) -> bytes:
    return b"".join(base64.b64decode(event["delta"]) for event in client.of("response.output_audio.delta"))


def words(client: Client) -> list[str]:
    return [event["delta"] for event in client.of("response.output_audio_transcript.delta")]


@pytest.mark.parametrize(
    "losses",
    [
        {"encode": {0}},
        {"hear": {0, 2}},
        {"extend": {0}},
        {"answer": {0}},
        {"answer": {1, 3}},
        {"say": {0}},
        {"say": {2, 4}},
        {"encode": {0, 1}, "hear": {1}, "extend": {1}, "answer": {2}, "say": {1, 3}},
    ],
    ids=str,
)
def test_whatever_is_lost_the_sound_is_the_same(model_and_stages: Any, losses: dict[str, set[int]]) -> None:
    model, stages = model_and_stages
    quiet = run(model_and_stages, spoken_turn())
    shaken = run((model, Losing(stages, losses)), spoken_turn())
    assert generated(shaken) == generated(quiet)
    assert sound(shaken) == sound(quiet)
    assert words(shaken) == words(quiet)
    assert not set(shaken.kinds()) ^ set(quiet.kinds())
    assert not shaken.of("error")


@pytest.mark.parametrize("stage", ["say", "hear", "extend"])
def test_a_stage_that_stays_away_ends_the_response_with_its_name(model_and_stages: Any, stage: str) -> None:
    """Never in silence, and the session goes on."""
    model, stages = model_and_stages
    losing = Losing(stages, {stage: set(range(1000))})
    names = {"say": "speech", "hear": "audio", "extend": "language"}
    if stage == "extend":
        losing._losses["answer"] = set(range(1000))

    async def go(client: Client) -> None:
        await client.send("session.update", session=SHORT)
        await client.say(room(0.4), voiced(1.4), room(0.8))
        done = (await client.wait("response.done"))["response"]
        if stage == "extend":  # packets were not prefilled; the answer reads them itself
            assert done["status"] in ("completed", "incomplete")
            return
        assert done["status"] == "failed"
        assert done["status_details"]["error"]["code"] == "stage_failed"
        assert done["status_details"]["error"]["message"] == f"the {names[stage]} stage failed; try again"
        losing._losses.clear()
        await settled(client)
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "which digit"}]}
        await client.send("conversation.item.create", item=item)
        await client.send("response.create")
        assert (await client.wait("response.done", 2))["response"]["status"] in ("completed", "incomplete")

    run((model, losing), go)


def test_a_picture_that_no_stage_reads_is_told_and_not_answered(model_and_stages: Any) -> None:
    model, stages = model_and_stages

    async def go(client: Client) -> None:
        content = [{"type": "input_image", "image_url": png()}]
        await client.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        await client.send("response.create")
        done = (await client.wait("response.done"))["response"]
        assert (done["status"], done["status_details"]["error"]["code"]) == ("failed", "stage_failed")
        assert client.of("error")[0]["error"]["message"] == "the vision stage failed; try again"

    run((model, Losing(stages, {"encode": {0, 1, 2}})), go)


def test_a_chat_answer_goes_on_too(model_and_stages: Any) -> None:
    model, stages = model_and_stages
    written = Rows.of_text(model.tokenizer.encode("USER:which digit is it\nVOICE ASSISTANT:"))
    rows = PromptRows(
        ids_T5=written.ids_T5,
        offsets=dict.fromkeys(FEATURE_MODALITIES, ()),
        voice=True,
        max_tokens=12,
        temperature=1.0,
        seed=3,
    )
    prompt = Prompt(rows=rows, media=dict.fromkeys(FEATURE_MODALITIES, ()), counts={})

    async def said(stages: Any) -> tuple[str, bytes]:
        turn = ChatTurn(stages, model.tokenizer, "chat", [], -1)
        pieces = [piece async for piece in turn.pieces(prompt, True)]
        return "".join(p.text for p in pieces), b"".join(p.wave_S.tobytes() for p in pieces)

    quiet = asyncio.run(said(stages))
    assert asyncio.run(said(Losing(stages, {"answer": {2}, "say": {1}}))) == quiet
    with pytest.raises(ApiError, match="the speech stage failed; try again"):
        asyncio.run(said(Losing(stages, {"say": set(range(9))})))


class Moving:
    """Two language replicas; a session's name moves between them, and neither is told."""

    def __init__(self, stages: Any, other: Any) -> None:
        self._stages, self.replicas, self.at = stages, (stages, other), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)

    async def extend(self, *given: Any) -> None:
        await self.replicas[self.at].extend(*given)

    def answer(self, *given: Any) -> Any:
        return self.replicas[self.at].answer(*given)

    def forget(self, session: str) -> None:
        for replica in self.replicas:
            replica.forget(session)


def test_rows_that_a_former_replica_still_has_are_never_taken_for_new_ones(model_and_stages: Any) -> None:
    """Away after a turn that is then deleted, and back when the conversation is as long again and another."""
    model, stages = model_and_stages

    def talk(moves: bool) -> Talk:
        async def go(client: Client) -> None:
            moving: Any = client.session.dialogue.stages
            await client.send("session.update", session={**SHORT, "output_modalities": ["text"]})
            for number, words in enumerate(["one", "which digit is it " * 12, "two", "say blue", "left"], start=1):
                moving.at = int(moves and number == 3)
                item = {"id": f"q{number}", "type": "message", "role": "user"}
                content = [{"type": "input_text", "text": words}]
                await client.send("conversation.item.create", item={**item, "content": content})
                await client.send("response.create")
                done = await client.wait("response.done", number)
                await settled(client)
                if number == 2:
                    await client.send("conversation.item.delete", item_id="q2")
                    await client.send("conversation.item.delete", item_id=done["response"]["output"][0]["id"])

        return go

    other = LocalStages(model)
    stayed = run((model, Moving(stages, other)), talk(False))
    moved = run((model, Moving(stages, other)), talk(True))
    assert moved.session.dialogue.recovered == 2
    assert generated(moved) == generated(stayed)
    asyncio.run(other.close())
