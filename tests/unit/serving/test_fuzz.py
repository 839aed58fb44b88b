"""Realtime events that no client should send, by the thousand: each is followed or answered, none is thrown back."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import string
from typing import Any

import pytest
from live import Client, check_ga, held, open_client, pcm, png, room

from pipelines.serving.realtime import dialogue

EVENTS = 1_500
"""In the suite; ``OMNI_RAY_FUZZ_EVENTS=100000`` for the whole figure."""
SESSION_EVENTS = 500
WORDS = (
    "auto",
    "none",
    "audio",
    "text",
    "realtime",
    "server_vad",
    "audio/pcm",
    "audio/pcmu",
    "user",
    "message",
    "root",
)
ITEMS: tuple[dict[str, Any], ...] = (
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "which digit is it"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": png(16)}]},
    {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_audio", "audio": base64.b64encode(pcm(room(0.1))).decode()}],
    },
    {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "be brief"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "seven."}]},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
)


def valid(draw: random.Random, items: list[str]) -> dict[str, Any]:
    """One well-formed event."""
    item_id = draw.choice([*items, "item_none"])
    sound = base64.b64encode(bytes(draw.randrange(256) for _ in range(draw.choice([0, 1, 2, 480, 961])))).decode()
    detection = draw.choice([None, {"type": "server_vad", "threshold": 0.5}, {"type": "semantic_vad"}])
    item: dict[str, Any] = {"id": f"item_{draw.randrange(40)}", **draw.choice(ITEMS)}
    return draw.choice(
        [
            {"type": "session.update", "session": {"type": "realtime", "max_output_tokens": draw.randrange(1, 6)}},
            {"type": "session.update", "session": {"audio": {"input": {"turn_detection": detection}}}},
            {"type": "session.update", "session": {"omni": {"video": True, "statistics": True}}},
            {"type": "input_audio_buffer.append", "audio": sound},
            {"type": "input_audio_buffer.commit"},
            {"type": "input_audio_buffer.clear"},
            {"type": "input_video_buffer.append", "image": png(16), "ts_ms": draw.randrange(5000)},
            {"type": "conversation.item.create", "item": item, "previous_item_id": item_id},
            {"type": "conversation.item.retrieve", "item_id": item_id},
            {"type": "conversation.item.delete", "item_id": item_id},
            {"type": "conversation.item.truncate", "item_id": item_id, "content_index": 0, "audio_end_ms": 60},
            {"type": "response.create", "response": {"max_output_tokens": 3}},
            {"type": "response.create", "response": {"conversation": "none", "input": [item], "max_output_tokens": 2}},
            {"type": "response.cancel"},
            {"type": "output_audio_buffer.clear"},
        ]
    )


def junk(draw: random.Random) -> Any:
    """Any value that JSON can hold."""
    text = "".join(draw.choice(string.printable + "\0\ud7ff\uffff\U0001f600") for _ in range(draw.randrange(12)))
    return draw.choice(
        [None, True, False, 0, -1, 2**70, 1e308, -0.0, "", text, draw.choice(WORDS), [], {}, [[]], {"type": text}]
    )


def spoiled(value: Any, draw: random.Random) -> Any:
    """The value with one place of it changed, dropped, doubled or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(list(value))
        change = draw.random()
        rest = {key: inner for key, inner in value.items() if key != name}
        if change < 0.15:
            return rest
        if change < 0.25:
            return {**rest, str(junk(draw))[:20]: value[name]}
        return {**value, name: spoiled(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        changed = spoiled(value[place], draw)
        return draw.choice([[*value, *value], [*value[:place], changed, *value[place + 1 :]]])
    return draw.choice([junk(draw), [value], {"type": value}, value])


def frame(draw: random.Random, items: list[str]) -> str:
    """One text frame, seldom a good one."""
    event = valid(draw, items)
    kind = draw.random()
    if kind < 0.15:
        return json.dumps(event)
    if kind < 0.85:
        for _ in range(draw.randrange(1, 4)):
            event = spoiled(event, draw)
        return json.dumps(event)
    text = json.dumps(event)
    place = draw.randrange(len(text))
    return draw.choice([text[:place], text[:place] + chr(draw.randrange(1, 0xD7FF)) + text[place:], text * 2, "\x00"])


async def _session(parts: Any, seed: int, events: int) -> Client:
    model, stages = parts
    draw = random.Random(seed)
    client = await open_client(stages, model)
    try:
        for _ in range(events):
            created = [event["item"]["id"] for event in client.of("conversation.item.added")[-5:]]
            await client.session.handle(frame(draw, created))
            if draw.random() < 0.1:
                await asyncio.sleep(0)
        # It still follows good events; an answer under way may speak on behind the refusal of the last.
        await client.send("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        await client.send("conversation.item.retrieve", item_id="item_never", event_id="the last")
        while not any(event["error"]["event_id"] == "the last" for event in client.of("error")):
            client.news.clear()
            await asyncio.wait_for(client.news.wait(), 60)
        assert client.session.settings.detection is None
    finally:
        await client.close()
    return client


@pytest.mark.parametrize("seed", range(max(1, int(os.environ.get("OMNI_RAY_FUZZ_EVENTS", EVENTS)) // SESSION_EVENTS)))
def test_spoiled_events_are_followed_or_answered(
    model_and_stages: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    monkeypatch.setattr(dialogue, "emit", lambda name, **facts: noted.append(f"{name} {facts}"))
    client = asyncio.run(_session(model_and_stages, seed, SESSION_EVENTS))
    assert noted == []
    assert len(client.of("error")) > SESSION_EVENTS // 10
    for event in client.events:
        check_ga(event)
    assert held(model_and_stages[1]) == (0, 0, 0)
