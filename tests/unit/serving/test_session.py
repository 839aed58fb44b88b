"""Live sessions over stages of one process: order of events, truth of histories, speculation that nobody sees."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
import torch
from live import (
    RESPONSE_ORDER,
    SHORT,
    Client,
    Talk,
    generated,
    pcm,
    png,
    room,
    run,
    settled,
    voiced,
)

from omni_ray.data.chat import answer_text, generation_prompt
from omni_ray.inference.requests import GenerationRequest
from pipelines.serving.sound import Format, SoundReader
from pipelines.serving.stages import Rows


def test_a_spoken_turn_in_the_order_of_the_protocol(model_and_stages: Any) -> None:
    async def talk(client: Client) -> None:
        await client.send("session.update", session=SHORT)
        await client.say(room(0.5), voiced(1.3), room(0.8))
        await client.wait("response.done")

    client = run(model_and_stages, talk)
    kinds = client.kinds()
    assert kinds[: kinds.index("response.created")] == [
        "session.created",
        "session.updated",
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    after = [kind for kind in kinds[kinds.index("response.created") :] if not kind.endswith(".delta")]
    assert after == [
        *RESPONSE_ORDER,
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    done = client.of("response.done")[0]["response"]
    assert done["status_details"] == {"type": "incomplete", "reason": "max_output_tokens"}
    assert done["usage"]["output_tokens"] == 14
    sound = b"".join(base64.b64decode(event["delta"]) for event in client.of("response.output_audio.delta"))
    assert len(sound) == 2 * 1440 * 13  # the last row holds the first id of a frame that was never finished
    assert abs(client.of("input_audio_buffer.speech_started")[0]["audio_start_ms"] - 200) <= 64
    assert abs(client.of("input_audio_buffer.speech_stopped")[0]["audio_end_ms"] - 1800) <= 96
    assert (
        done["output"][0]["content"][0]["transcript"]
        == "".join(event["delta"] for event in client.of("response.output_audio_transcript.delta")).strip()
    )


@pytest.mark.parametrize(
    "omni", [{}, {"speculation": False}, {"speculation": False, "streaming_prefill": False}], ids=str
)
def test_streamed_and_speculated_equals_the_offline_prompt(model_and_stages: Any, omni: dict[str, bool]) -> None:
    """The offline prompt is the turn's sound up to t3 (t4 without speculation), ended as at the end of a stream."""
    model, _ = model_and_stages

    async def talk(client: Client) -> None:
        await client.send("session.update", session={**SHORT, "omni": omni})
        sound = [room(0.5), voiced(2.6), room(0.8)]
        await client.say(*sound)
        await client.wait("response.done")
        await settled(client)
        turn = client.session.dialogue.conversation.items[0]
        rows = Rows.joined([block.rows for block in turn.blocks])
        event = client.of("input_audio_buffer.speech_stopped")[0]
        start = client.of("input_audio_buffer.speech_started")[0]["audio_start_ms"] * 16
        wait_ms = 600 if omni else 250
        heard = SoundReader(Format()).push(pcm(np.concatenate(sound)))
        wave = heard[start : event["audio_end_ms"] * 16 + wait_ms * 16]
        features = model.encode("audio", [wave])[0]
        ids = generation_prompt([{"role": "user", "content": []}], True, model.tokenizer, model.config).ids_T5
        user = len(model.tokenizer.encode("USER:"))
        placeholders = Rows.of_text(
            [
                model.tokenizer.audio_begin_id,
                *[model.tokenizer.audio_pad_id] * len(features),
                model.tokenizer.audio_end_id,
            ]
        )
        offline = np.concatenate([ids[:user], placeholders.ids_T5, ids[user:]])
        assert np.array_equal(rows.ids_T5, offline[: len(rows)])
        assert np.array_equal(np.concatenate([values for _, values in rows.features]), features.numpy())
        request = GenerationRequest(
            ids_T5=torch.from_numpy(offline), features=((user + 1, features),), voice=True, max_tokens=14
        )
        (answer,) = model.engine.generate([request])
        assert generated(client) == [answer.ids_R5.tolist()]
        said = answer_text(answer.ids_R5[:, 0].tolist(), model.tokenizer)
        assert client.of("response.output_audio_transcript.done")[0]["transcript"] == said

    run(model_and_stages, talk)


def test_a_rollback_leaves_what_a_run_without_speculation_leaves(model_and_stages: Any) -> None:
    """The user pauses, an answer is begun unseen, the user goes on: same rows, same answer, nothing shown."""

    def talk(omni: dict[str, bool], found: dict[str, Any]) -> Talk:
        async def go(client: Client) -> None:
            await client.send("session.update", session={**SHORT, "omni": omni})
            await client.say(room(0.4), voiced(1.5), room(0.45))
            if client.session.turns.attempt is not None:
                response = client.session.turns.attempt.response
                while not response.done.rows:
                    await asyncio.sleep(0.002)
            assert not client.of("response.created")
            await client.say(voiced(1.2, seed=3), room(0.45))
            await asyncio.sleep(0.02)
            await client.say(voiced(0.6, seed=5), room(0.8))
            await client.wait("response.done")
            await settled(client)
            found["rows"] = Rows.joined([b.rows for b in client.session.dialogue.conversation.items[0].blocks])
            found["said"], found["rollbacks"] = generated(client), client.session.turns.rollbacks
            found["wasted"] = client.session.answers.wasted_rows

        return go

    spoken: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    run(model_and_stages, talk({"speculation": True}, spoken))
    # The end without speculation is taken at t4, so the sound up to t3 is compared.
    run(model_and_stages, talk({"speculation": False}, plain))
    assert spoken["rollbacks"] == 2
    assert spoken["wasted"] >= 1
    assert plain["rollbacks"] == 0
    shared = len(spoken["rows"]) - 12
    assert np.array_equal(spoken["rows"].ids_T5[:shared], plain["rows"].ids_T5[:shared])
    a, b = (np.concatenate([values for _, values in one["rows"].features]) for one in (spoken, plain))
    certain = len(a) - 7
    assert np.array_equal(a[:certain], b[:certain])


def test_barge_in_stops_the_sound_and_cuts_the_history_at_punctuation(model_and_stages: Any) -> None:
    async def talk(client: Client) -> None:
        await client.say(room(0.4), voiced(1.0), room(0.8))
        await client.wait("response.output_audio.delta", 12)
        await client.say(voiced(0.6, seed=2))
        done = (await client.wait("response.done"))["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "turn_detected")
        place = client.events.index(client.of("response.done")[0])
        assert not [e for e in client.events[place:] if e["type"].startswith("response.output_audio")]
        await client.say(room(0.8))
        await client.wait("response.output_audio.delta", len(client.of("response.output_audio.delta")) + 1)
        await client.send("response.cancel")
        await client.wait("response.done", 2)
        await settled(client)

    client = run(model_and_stages, talk)
    answers = [item for item in client.session.dialogue.conversation.items if item.role == "assistant"]
    assert len(answers) == 2
    for item in answers:
        words = item.content[0]["transcript"]
        assert words == "" or words[-1] in ".!?,;:"
        assert bool(item.blocks) == bool(item.spoken is not None and len(item.spoken.ids_R5))
    kinds = client.kinds()
    assert kinds.index("response.done") < kinds.index(
        "input_audio_buffer.speech_started", kinds.index("response.created")
    )


@pytest.mark.parametrize("interrupt", [True, False])
def test_speech_into_an_answer_that_the_client_asked_for_is_answered(model_and_stages: Any, interrupt: bool) -> None:
    """Its sound is sent long before it is heard; the turn that ends meanwhile has its answer all the same."""

    async def talk(client: Client) -> None:
        detection = {"type": "server_vad", "interrupt_response": interrupt}
        session = {"type": "realtime", "max_output_tokens": 60, "audio": {"input": {"turn_detection": detection}}}
        await client.send("session.update", session=session)
        content = [{"type": "input_text", "text": "which digit is it"}]
        await client.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        await client.send("response.create")
        first = await client.wait("response.done")
        await client.say(voiced(0.8), room(1.2))
        second = await client.wait("response.done", 2)
        assert second["response"]["id"] != first["response"]["id"]
        assert second["response"]["status"] in ("completed", "incomplete")
        assert len(client.of("input_audio_buffer.committed")) == 1

    run(model_and_stages, talk)


def test_push_to_talk_text_pictures_and_responses_apart(model_and_stages: Any) -> None:
    async def talk(client: Client) -> None:
        off = {"input": {"turn_detection": None}}
        await client.send("session.update", session={**SHORT, "audio": off, "output_modalities": ["text"]})
        await client.send("input_audio_buffer.commit", event_id="too-early")
        await client.say(voiced(1.2))
        assert not client.of("input_audio_buffer.speech_started")
        await client.send("input_audio_buffer.commit")
        await client.wait("input_audio_buffer.committed")
        picture = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_image", "image_url": png()}, {"type": "input_text", "text": "which colour"}],
        }
        await client.send("conversation.item.create", item=picture)
        await client.send("response.create", response={"metadata": {"client_event_id": "x1"}})
        done = (await client.wait("response.done"))["response"]
        assert done["metadata"] == {"client_event_id": "x1"}
        assert client.of("response.created")[0]["response"]["metadata"] == {"client_event_id": "x1"}
        assert min(done["usage"]["input_token_details"][k] for k in ("text_tokens", "audio_tokens", "image_tokens")) > 0
        before = len(client.session.dialogue.conversation.items)
        words = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say two"}]}]
        await client.send(
            "response.create", response={"conversation": "none", "input": words, "output_modalities": ["audio"]}
        )
        apart = (await client.wait("response.done", 2))["response"]
        assert apart["conversation_id"] is None
        assert len(client.session.dialogue.conversation.items) == before
        assert not [e for e in client.of("conversation.item.added") if e["item"]["id"] == apart["output"][0]["id"]]

    client = run(model_and_stages, talk)
    (error,) = client.of("error")
    assert error["error"]["code"] == "input_audio_buffer_commit_empty"
    assert error["error"]["event_id"] == "too-early"
    assert (
        "".join(e["delta"] for e in client.of("response.output_text.delta")).strip()
        == client.of("response.output_text.done")[0]["text"]
    )


def test_items_truncation_and_deletion_change_what_the_model_reads(model_and_stages: Any) -> None:
    async def talk(client: Client) -> None:
        await client.send("session.update", session={**SHORT, "instructions": "answer in one word"})
        content = [{"type": "input_text", "text": "which digit"}]
        item = {"type": "message", "role": "user", "id": "mine", "content": content}
        await client.send("conversation.item.create", item=item)
        await client.send("response.create")
        done = (await client.wait("response.done"))["response"]
        answer = done["output"][0]["id"]
        await client.send("conversation.item.truncate", item_id=answer, content_index=0, audio_end_ms=5000)
        await client.send("conversation.item.truncate", item_id=answer, content_index=0, audio_end_ms=300)
        kept = client.session.dialogue.conversation.find(answer).spoken
        assert kept is not None
        assert len(kept.ids_R5) <= 5
        await client.send("conversation.item.retrieve", item_id="mine")
        await client.send("conversation.item.retrieve", item_id="none", event_id="rci_none")
        await client.send("conversation.item.delete", item_id="mine")
        await client.send("conversation.item.create", item={**item, "id": "again"}, previous_item_id="root")
        await client.send("response.create")
        await client.wait("response.done", 2)
        await client.send("response.cancel")  # late, and not noisy
        await settled(client)

    client = run(model_and_stages, talk)
    codes = [event["error"]["code"] for event in client.of("error")]
    assert codes == ["invalid_audio_end_ms", "item_retrieve_invalid_item_id"]
    assert client.of("error")[1]["error"]["event_id"] == "rci_none"
    assert client.of("conversation.item.retrieved")[0]["item"]["content"] == [
        {"type": "input_text", "text": "which digit"}
    ]
    assert [e["item_id"] for e in client.of("conversation.item.deleted")] == ["mine"]
    ids = [item.id for item in client.session.dialogue.conversation.items]
    assert ids[0] == "again"
    # After all edits the cache was made equal to the history: the second answer is that of a fresh session.
    cached = client.of("response.done")[1]["response"]["usage"]["input_token_details"]["cached_tokens"]
    assert cached == len(client.session.dialogue.system or ())


def test_frames_of_a_camera_stand_between_the_seconds_of_sound(model_and_stages: Any) -> None:
    model, _ = model_and_stages

    async def talk(client: Client) -> None:
        await client.send("input_video_buffer.append", image=png(), ts_ms=0)
        await client.send("session.update", session={**SHORT, "omni": {"video": True}})
        sound = np.concatenate([room(0.4), voiced(2.2), room(0.8)])
        for step in range(34):
            if step % 5 == 0:
                await client.send("input_video_buffer.append", image=png(red=5 * step), ts_ms=100 * step)
            await client.say(sound[2400 * step : 2400 * (step + 1)])
        await client.wait("response.done")
        await settled(client)

    client = run(model_and_stages, talk)
    assert [event["error"]["code"] for event in client.of("error")] == ["unknown_event"]
    ids = Rows.joined([b.rows for b in client.session.dialogue.conversation.items[0].blocks]).ids_T5[:, 0].tolist()
    tokenizer = model.tokenizer
    shape: list[tuple[str, int]] = []
    for token in ids:
        name = {tokenizer.image_pad_id: "v", tokenizer.audio_pad_id: "a"}.get(token, "t")
        if shape and shape[-1][0] == name:
            shape[-1] = (name, shape[-1][1] + 1)
        else:
            shape.append((name, 1))
    assert [count for name, count in shape if name == "a"][:2] == [12, 13]
    assert sum(name == "v" for name, _ in shape) >= 3
