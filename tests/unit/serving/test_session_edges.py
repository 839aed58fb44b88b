"""Live sessions at their edges: stages that fail or forget, events that cannot be, other formats, transcripts."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from live import (
    SHORT,
    Client,
    Talk,
    generated,
    pcm,
    room,
    run,
    settled,
    voiced,
)

from pipelines.serving.realtime.client_events import _REQUIRED
from pipelines.serving.stages import SessionLostError


def test_a_stage_that_lost_the_session_is_given_it_again(model_and_stages: Any) -> None:
    """The replicas of language and hearing are new ones in the middle of a turn: the answer is the same."""

    def talk(lose: bool) -> Talk:
        async def go(client: Client) -> None:
            await client.send("session.update", session=SHORT)
            await client.say(room(0.4), voiced(2.4))
            await settled(client)
            if lose:
                stages = client.session.dialogue.stages
                stages.ears.forget(client.session.id)  # type: ignore[attr-defined]
                stages.language.forget(client.session.dialogue.cache_name)  # type: ignore[attr-defined]
            await client.say(room(0.8))
            await client.wait("response.done")
            await settled(client)

        return go

    whole, again = run(model_and_stages, talk(False)), run(model_and_stages, talk(True))
    assert (whole.session.dialogue.recovered, again.session.dialogue.recovered) == (0, 2)
    assert generated(again) == generated(whole)


def test_a_failing_stage_ends_the_response_and_not_the_session(
    model_and_stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stages = model_and_stages

    async def talk(client: Client) -> None:
        async def gone(*_: Any) -> Any:
            raise SessionLostError("always")

        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "which digit"}]}
        await client.send("conversation.item.create", item=item)
        with monkeypatch.context() as patched:
            patched.setattr(stages, "answer", _failing)
            await client.send("response.create")
            done = (await client.wait("response.done"))["response"]
        assert done["status"] == "failed"
        assert done["status_details"]["error"]["message"]
        await client.send("response.create", response={"max_output_tokens": 3})
        assert (await client.wait("response.done", 2))["response"]["status"] in ("completed", "incomplete")

    run(model_and_stages, talk)


def update(settings: str) -> str:
    return '{"type": "session.update", "session": {"type": "realtime", ' + settings + "}}"


def user_says(part: str) -> str:
    item = '{"type": "message", "role": "user", "content": [' + part + "]}"
    return '{"type": "conversation.item.create", "item": ' + item + "}"


async def _failing(*_: Any) -> Any:
    raise SessionLostError("always")
    yield


def test_bad_events_are_answered_and_the_session_goes_on(model_and_stages: Any) -> None:
    bad = [
        "{",
        "[]",
        '"x"',
        "{}",
        '{"type": 5}',
        '{"type": "no.such"}',
        '{"type": "session.update"}',
        '{"type": "session.update", "session": 3}',
        update('"audio": {"input": {"format": {"type": "audio/opus"}}}'),
        update('"audio": {"input": {"format": {"type": "audio/pcm", "rate": 44100}}}'),
        update('"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 7}}}'),
        update('"max_output_tokens": 0'),
        '{"type": "input_audio_buffer.append", "audio": "***"}',
        '{"type": "input_audio_buffer.append"}',
        '{"type": "conversation.item.create", "item": {}}',
        user_says('{"type": "input_image", "image_url": "http://127.0.0.1/x.png"}'),
        user_says('{"type": "input_image", "image_url": "data:image/png;base64,aGFsbG8="}'),
        '{"type": "conversation.item.delete", "item_id": "no"}',
        '{"type": "conversation.item.truncate", "item_id": "no", "audio_end_ms": 1}',
        '{"type": "conversation.item.truncate", "item_id": "no", "audio_end_ms": true}',
        '{"type": "response.create", "response": {"metadata": {"x": 5}}}',
        '{"type": "response.create", "response": {"input": [{"type": "message"}]}}',
        '{"type": "response.cancel"}',
        '{"type": "session.update", "session": ' + '{"a": ' * 60 + "1" + "}" * 61,
        '{"type": "input_audio_buffer.commit", "event_id": 5}',
    ]

    async def talk(client: Client) -> None:
        for frame in bad:
            await client.session.handle(frame)
        await client.send("session.update", session=SHORT)
        await client.wait("session.updated")

    client = run(model_and_stages, talk)
    assert len(client.of("error")) == len(bad)
    assert all(event["error"]["message"] for event in client.of("error"))


def test_g711_and_sixteen_kilohertz_and_beta_names(model_and_stages: Any) -> None:
    async def phone(client: Client) -> None:
        both = {"format": {"type": "audio/pcmu"}}
        await client.send("session.update", session={**SHORT, "audio": {"input": both, "output": both}})
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say two"}]}
        await client.send("conversation.item.create", item=item)
        await client.send("response.create")
        await client.wait("response.done")

    client = run(model_and_stages, phone)
    sound = b"".join(base64.b64decode(event["delta"]) for event in client.of("response.output_audio.delta"))
    assert len(sound) == 480 * 13

    async def beta(client: Client) -> None:
        await client.send(
            "session.update",
            session={
                "modalities": ["text", "audio"],
                "input_audio_format": "pcm16",
                "turn_detection": None,
                "max_response_output_tokens": 6,
            },
        )
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say two"}]}
        await client.send("conversation.item.create", item=item)
        await client.send("response.create")
        await client.wait("response.done")

    kinds = run(model_and_stages, beta, beta=True).kinds()
    assert "response.audio.delta" in kinds
    assert "conversation.item.created" in kinds
    assert not any(
        "output_" in kind and kind != "response.output_item.added" and kind != "response.output_item.done"
        for kind in kinds
    )


def test_transcription_is_told_with_its_usage(model_and_stages: Any) -> None:
    async def talk(client: Client) -> None:
        asked = {
            "input": {
                "transcription": {"model": "any"},
                "turn_detection": {"type": "server_vad", "create_response": False},
            }
        }
        await client.send("session.update", session={**SHORT, "audio": asked})
        await client.say(room(0.4), voiced(1.0), room(0.8))
        done = await client.wait("conversation.item.input_audio_transcription.completed")
        assert done["usage"]["input_token_details"]["audio_tokens"] > 0
        assert not client.of("response.created")
        assert client.session.dialogue.conversation.items[0].content[0]["transcript"] == done["transcript"]
        # Nothing was answered, so the next turn is a turn and no barge-in.
        await client.say(room(0.3), voiced(0.8), room(0.8))
        await client.wait("input_audio_buffer.committed", 2)

    run(model_and_stages, talk)


def test_every_client_event_has_a_handler(model_and_stages: Any) -> None:
    async def talk(client: Client) -> None:
        assert set(client.session._handlers) == set(_REQUIRED)
        await client.send("input_audio_buffer.append", audio=base64.b64encode(pcm(voiced(0.3))).decode())
        await client.send("input_audio_buffer.clear")
        await client.send("output_audio_buffer.clear")
        await client.wait("input_audio_buffer.cleared")

    run(model_and_stages, talk)
