"""Requests: what is taken, what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from omni_ray.config.serving import Limits
from pipelines.serving.errors import ApiError
from pipelines.serving.protocol import ChatRequest, check_request, read_json

LIMITS = Limits(max_messages=3, max_tokens=100)


def asked(**fields: Any) -> ChatRequest:
    return check_request({"messages": [{"role": "user", "content": "hello"}], **fields}, LIMITS)


def test_text_and_parts_are_the_same_request() -> None:
    text = asked()
    parts = asked(messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    assert text == parts
    assert not text.speaks


def test_unknown_fields_are_ignored_at_every_depth() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hello", "new": 1}], "name": "me", "new": [1]}
    assert asked(messages=[message], metadata={"a": "b"}, user="me", store=False, parallel_tool_calls=None) == asked()


def test_the_newer_bound_wins_and_one_stop_is_a_list() -> None:
    request = asked(max_tokens=5, max_completion_tokens=7, stop="end", temperature=1, stream=False, tools=[], n=1)
    assert (request.most_tokens, request.stop, request.temperature) == (7, ["end"], 1.0)


def test_speech_is_asked_for_by_modalities() -> None:
    assert asked(modalities=["text", "audio"], audio={"voice": "alloy", "format": "pcm16"}).speaks
    assert not asked(modalities=["text"]).speaks
    assert not asked(modalities=None, audio=None).speaks


def parts(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}]}


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages is a list; list should have at least 1 item after validation, not 0"),
    ({"messages": None}, "messages", "messages is null; input should be a valid list"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "messages[0].role is missing"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "messages[0].role is 'tool'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "messages[0].content is 5;"),
    (parts({"type": "text", "text": 5}), "messages[0].content[0].text", "messages[0].content[0].text is 5;"),
    (parts({"text": "hi"}), "messages[0].content[0]", "has no type; parts are text, image_url, input_audio, video_url"),
    (parts({"type": "file"}), "messages[0].content[0].type", "is 'file'; parts are text, image_url, input_audio"),
    (
        parts({"type": "image_url", "image_url": "data:"}),
        "messages[0].content[0].image_url",
        "messages[0].content[0].image_url is 'data:'",
    ),
    (
        parts({"type": "input_audio", "input_audio": {"data": "x", "format": "aiff"}}),
        "messages[0].content[0].input_audio.format",
        "is 'aiff'; input should be 'wav', 'mp3', 'flac' or 'ogg'",
    ),
    ({"messages": [{"role": "user", "content": "a"}] * 4}, "messages", "messages holds 4 turns, more than 3"),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'; input should be a valid integer"),
    ({"max_tokens": True}, "max_tokens", "max_tokens is true;"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0;"),
    ({"max_tokens": 101}, "max_tokens", "max_tokens is 101, above this server's 100; lower it"),
    ({"max_completion_tokens": 101}, "max_completion_tokens", "max_completion_tokens is 101, above"),
    ({"temperature": 2.5}, "temperature", "temperature is 2.5;"),
    ({"temperature": "hot"}, "temperature", "temperature is 'hot';"),
    ({"seed": 1.5}, "seed", "seed is 1.5;"),
    ({"stop": ["a"] * 5}, "stop", "stop is a list;"),
    ({"stop": [""]}, "stop", "stop holds an empty text; leave it out"),
    ({"stop": 3}, "stop", "stop is 3;"),
    ({"modalities": ["video"]}, "modalities[0]", "modalities[0] is 'video';"),
    ({"modalities": []}, "modalities", "modalities is a list;"),
    ({"audio": {"format": "mp3"}}, "audio.format", "audio.format is 'mp3'; input should be 'wav' or 'pcm16'"),
    ({"stream": True, "modalities": ["text", "audio"]}, "audio.format", "a streamed spoken answer comes as pcm16"),
    ({"n": 2}, "n", "n is 2; this server gives one choice"),
    ({"top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    ({"tools": [{}]}, "tools", "tools are not supported by this model"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format may only be text"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSALS, ids=[f"{r[1]}-{i}" for i, r in enumerate(REFUSALS)])
def test_wrong_requests_are_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**fields)
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert words in str(error)
    assert error.body["error"].keys() == {"message", "type", "param", "code"}
    assert error.body["error"]["type"] == "invalid_request_error"


def test_long_texts_never_come_back() -> None:
    secret = "secret " * 50
    with pytest.raises(ApiError, match=r"seed is a text of 350 characters") as caught:
        asked(seed=secret)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [None, [], "text", 5, True], ids=["null", "list", "text", "number", "truth"])
def test_a_body_that_is_no_object(body: Any) -> None:
    with pytest.raises(ApiError, match=r"^the body is (null|a list|a text|a number|a truth value); send a JSON object"):
        check_request(body, LIMITS)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "is not JSON (line 1 column 2)"),
        (b"", "is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "the body is"),
        (b"[" * 40 + b"]" * 40, "nested deeper than 32 levels"),
        (b"1" * 5000, "is not JSON"),
    ],
    ids=["cut", "empty", "nan", "encoding", "deep", "deeper-than-allowed", "huge-number"],
)
def test_bodies_that_are_no_json(raw: bytes, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_json(raw)
    assert words in str(caught.value)
    assert caught.value.code == "invalid_json"


def test_nesting_within_the_limit_is_read() -> None:
    assert read_json(b"[" * 30 + b"]" * 30) is not None
