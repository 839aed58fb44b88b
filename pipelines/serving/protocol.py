"""The chat-completions request: its shape, checked before anything is decoded.

Unknown fields are ignored, as clients expect; known fields of a wrong type, and known features that would change the
answer but are not built, are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from omni_ray.config.serving import Limits
from pipelines.serving.errors import ApiError, bad_request

PART_TYPES = ("text", "image_url", "input_audio", "video_url")
ROLES = ("system", "developer", "user", "assistant")
MAX_STOPS = 4
_MAX_DEPTH = 32


class _Loose(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class TextPart(_Loose):
    """Words."""

    type: Literal["text"]
    text: str


class Url(_Loose):
    """Where media lies: a data URI."""

    url: str


class ImagePart(_Loose):
    """A picture."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Loose):
    """A film."""

    type: Literal["video_url"]
    video_url: Url


class AudioData(_Loose):
    """Sound, base64."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(_Loose):
    """A sound to hear."""

    type: Literal["input_audio"]
    input_audio: AudioData


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart, Field(discriminator="type")]


class AudioReference(_Loose):
    """An earlier spoken answer, by its id."""

    id: str


class Message(_Loose):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(default_factory=list)
    audio: AudioReference | None = None

    @field_validator("content", mode="before")
    @classmethod
    def as_parts(cls, value: Any) -> Any:
        """Plain text is one text part; null (an assistant's spoken turn) is none."""
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        return [] if value is None else value


class SpeechOptions(_Loose):
    """How a spoken answer is sent."""

    voice: Any = None
    """Accepted and not used: the model has one voice."""
    format: Literal["wav", "pcm16"] = "wav"


class StreamOptions(_Loose):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None


class ChatRequest(_Loose):
    """Body of ``POST /v1/chat/completions``."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "audio"]] | None = Field(default=None, min_length=1)
    audio: SpeechOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, value: Any) -> Any:
        """One word is a list of one."""
        if isinstance(value, str):
            return [value]
        return [] if value is None else value

    @property
    def speaks(self) -> bool:
        """Whether a spoken answer is asked for."""
        return "audio" in (self.modalities or ())

    @property
    def alternatives(self) -> int:
        """Alternatives beside each token's log-probability; -1: none asked for."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def most_tokens(self) -> int | None:
        """The caller's bound on generated rows; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def read_json(raw: bytes) -> Any:
    """Parse a body.

    Raises:
        ApiError: 400, not JSON, nested too deep, or with numbers that JSON has not.
    """
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        where = f"line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else "its text"
        raise bad_request(f"the body is not JSON ({where}); send one JSON object", code="invalid_json") from None
    if _depth(value) > _MAX_DEPTH:
        raise bad_request(f"the body is nested deeper than {_MAX_DEPTH} levels; send it flatter", code="invalid_json")
    return value


def check_request(body: Any, limits: Limits) -> ChatRequest:
    """Check the shape of a request.

    Raises:
        ApiError: 400, names the field, what stands there and what may.
    """
    if not isinstance(body, Mapping):
        raise bad_request(f"the body is {_name_of(body)}; send a JSON object with messages")
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise refusal_of(error) from None
    _refuse_unbuilt(body, request)
    if len(request.messages) > limits.max_messages:
        raise bad_request(
            f"messages holds {len(request.messages)} turns, more than {limits.max_messages}; leave the oldest out",
            param="messages",
        )
    most = request.most_tokens
    if most is not None and most > limits.max_tokens:
        name = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
        raise bad_request(f"{name} is {most}, above this server's {limits.max_tokens}; lower it", param=name)
    if any(not stop for stop in request.stop):
        raise bad_request("stop holds an empty text; leave it out", param="stop")
    return request


def _refuse_unbuilt(body: Mapping[str, Any], request: ChatRequest) -> None:
    """Refuse what would silently give another answer than the one asked for."""
    refusals = (
        (
            (request.n or 1) > 1,
            "n",
            f"n is {request.n}; this server gives one choice, send the request again for another",
        ),
        (
            bool(request.stream) and request.speaks and (request.audio is None or request.audio.format != "pcm16"),
            "audio.format",
            "a streamed spoken answer comes as pcm16; send audio.format pcm16",
        ),
        (bool(body.get("tools")), "tools", "tools are not supported by this model; leave the field out"),
        (bool(body.get("functions")), "functions", "functions are not supported by this model; leave the field out"),
        (_structured(body), "response_format", "response_format may only be text; leave the field out"),
    )
    for refused, param, message in refusals:
        if refused:
            raise bad_request(message, param=param, code="unsupported_parameter")


def _structured(body: Mapping[str, Any]) -> bool:
    wanted = body.get("response_format")
    return wanted is not None and not (isinstance(wanted, Mapping) and wanted.get("type") == "text")


def refusal_of(error: ValidationError) -> ApiError:
    """A 400 that names the first field that cannot be."""
    first = error.errors(include_url=False)[0]
    where = _place(first["loc"])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return bad_request(f"{where} is missing", param=where, code="missing_required_parameter")
    if kind == "union_tag_invalid":
        found = _shown(context.get("tag"))
        return bad_request(f"{where}.type is {found}; parts are {', '.join(PART_TYPES)}", param=f"{where}.type")
    if kind == "union_tag_not_found":
        return bad_request(f"{where} has no type; parts are {', '.join(PART_TYPES)}", param=where)
    message = first["msg"][0].lower() + first["msg"][1:]
    return bad_request(f"{where} is {_shown(first['input'])}; {message}", param=where, code="invalid_type")


def _place(location: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].text``; the tag that pydantic adds after a part's number is left out."""
    words = ""
    for i, step in enumerate(location):
        if isinstance(step, int):
            words += f"[{step}]"
        elif i >= 2 and isinstance(location[i - 1], int) and location[i - 2] == "content":
            continue
        else:
            words += f".{step}" if words else step
    return words


def _shown(value: Any) -> str:
    """A short form of what was sent; long texts and media never come back."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"a text of {len(value)} characters"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return _name_of(value)


def _name_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion."""
    level, deepest = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        deepest += 1
        if deepest > _MAX_DEPTH:
            break
    return deepest
