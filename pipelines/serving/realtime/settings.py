"""A session's settings: what a client may set, in the general-availability and the beta form, and how they are told."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from omni_ray.config.serving import TurnConfig
from pipelines.serving.realtime.client_events import EventError
from pipelines.serving.sound import KINDS, Format

MOST_TOKENS = 4096
_BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_EAGERNESS_MS = {"low": 1200, "medium": 700, "high": 450, "auto": 700}
_OMNI_DEFAULTS = {"video": False, "statistics": False, "speculation": True, "streaming_prefill": True}
_RATES = (16000, 24000)


class Settings:
    """The session object."""

    def __init__(self, model: str, turn: TurnConfig, session_id: str, beta: bool = False) -> None:
        self.beta = beta
        self.turn = turn
        self.omni: dict[str, Any] | None = None
        self.body: dict[str, Any] = {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": model,
            "output_modalities": ["audio"],
            "instructions": "",
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "truncation": "auto",
            "tracing": None,
            "prompt": None,
            "include": None,
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": 24000},
                    "transcription": None,
                    "noise_reduction": None,
                    "turn_detection": _vad(turn),
                },
                "output": {"format": {"type": "audio/pcm", "rate": 24000}, "voice": "default", "speed": 1.0},
            },
        }

    @property
    def voice(self) -> bool:
        """Answers are spoken."""
        return "audio" in self.body["output_modalities"]

    @property
    def detection(self) -> dict[str, Any] | None:
        """Server-side turn detection, or None for push-to-talk."""
        found: dict[str, Any] | None = self.body["audio"]["input"]["turn_detection"]
        return found

    @property
    def input_format(self) -> Format:
        """Of the client's sound."""
        return format_of(self.body["audio"]["input"]["format"])

    @property
    def output_format(self) -> Format:
        """Of the answers' sound."""
        return format_of(self.body["audio"]["output"]["format"])

    @property
    def speculates(self) -> bool:
        """Whether answers are begun before the end of a turn is certain."""
        return bool((self.omni or _OMNI_DEFAULTS)["speculation"])

    @property
    def streams(self) -> bool:
        """Whether packets are prefilled while the user speaks."""
        return bool((self.omni or _OMNI_DEFAULTS)["streaming_prefill"])

    def opted(self, name: str) -> bool:
        """Whether an extension was asked for."""
        return bool((self.omni or {}).get(name, False))

    def turn_config(self) -> TurnConfig:
        """Thresholds and silences of this session."""
        found = self.detection or {}
        changes: dict[str, Any] = {}
        if found.get("type") == "server_vad":
            changes = {
                "threshold": found["threshold"],
                "prefix_ms": found["prefix_padding_ms"],
                "silence_ms": found["silence_duration_ms"],
            }
        elif found.get("type") == "semantic_vad":
            changes = {"silence_ms": _EAGERNESS_MS[found["eagerness"]]}
        silence = changes.get("silence_ms", self.turn.silence_ms)
        wanted = (self.omni or {}).get("speculate_ms", self.turn.speculate_ms)
        changes["speculate_ms"] = min(wanted, silence) if self.speculates else silence
        changes["release"] = min(self.turn.release, changes.get("threshold", self.turn.threshold) * 0.9)
        return TurnConfig.model_validate(self.turn.model_dump() | changes)

    def update(self, given: Mapping[str, Any], spoken: bool) -> None:
        """Take a ``session.update``; what is left out stays as it is.

        Args:
            given: The session of the event, in either form.  spoken: The session has said something: its voice stays.
        Raises:
            EventError: a field that cannot be; nothing is changed then.
        """
        if given.get("type") == "transcription":
            raise EventError(
                "session.type is 'transcription'; this server holds sessions of type 'realtime'", "session.type"
            )
        given, body = _from_beta(given), copy.deepcopy(self.body)
        for name in ("instructions", "tools", "tool_choice", "truncation", "tracing", "prompt", "include"):
            if name in given:
                body[name] = given[name]
        if not isinstance(body["instructions"] or "", str):
            raise EventError("session.instructions is no text", "session.instructions")
        if "output_modalities" in given:
            body["output_modalities"] = modalities(given["output_modalities"], "session.output_modalities")
        if "max_output_tokens" in given:
            body["max_output_tokens"] = most_tokens(given["max_output_tokens"], "session.max_output_tokens")
        audio = _mapping(given.get("audio"), "session.audio")
        _update_input(body["audio"]["input"], _mapping(audio.get("input"), "session.audio.input"), self.turn)
        _update_output(body["audio"]["output"], _mapping(audio.get("output"), "session.audio.output"), spoken)
        omni = self.omni
        if "omni" in given:
            omni = _omni(given["omni"], omni)
        self.body, self.omni = body, omni

    def wire(self) -> dict[str, Any]:
        """The session as this client reads it."""
        body = copy.deepcopy(self.body)
        if self.omni is not None:
            body["omni"] = dict(self.omni)
        if not self.beta:
            return body
        heard, said = body.pop("audio").values()
        names = {kind: name for name, kind in _BETA_FORMATS.items()}
        body |= {
            "modalities": ["text", "audio"] if "audio" in body.pop("output_modalities") else ["text"],
            "input_audio_format": names[heard["format"]["type"]],
            "output_audio_format": names[said["format"]["type"]],
            "input_audio_transcription": heard["transcription"],
            "turn_detection": heard["turn_detection"],
            "voice": said["voice"],
            "max_response_output_tokens": body.pop("max_output_tokens"),
            "temperature": 0.8,
        }
        return body


def modalities(value: Any, where: str) -> list[str]:
    """``["audio"]`` or ``["text"]``; the beta form's both means audio with its transcript."""
    if not isinstance(value, list) or not value or not set(map(str, value)) <= {"text", "audio"}:
        raise EventError(f'{where} is {_short(value)}; send ["audio"] or ["text"]', where)
    return ["audio"] if "audio" in value else ["text"]


def most_tokens(value: Any, where: str) -> int | str:
    """1..4096 or ``"inf"``."""
    if value == "inf" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS):
        return value
    raise EventError(f'{where} is {_short(value)}; send 1..{MOST_TOKENS} or "inf"', where)


def audio_format(value: Any, where: str) -> dict[str, Any]:
    """A format object in its full form.

    Raises:
        EventError: an unknown type, or a rate that this server does not take.
    """
    found = _mapping(value, where)
    kind = found.get("type", "audio/pcm")
    if kind not in KINDS:
        raise EventError(f"{where}.type is {_short(kind)}; formats are {', '.join(KINDS)}", f"{where}.type")
    if kind != "audio/pcm":
        return {"type": kind}
    rate = found.get("rate", 24000)
    if rate not in _RATES or isinstance(rate, bool):
        raise EventError(f"{where}.rate is {_short(rate)}; pcm comes at 24000 or 16000", f"{where}.rate")
    return {"type": kind, "rate": rate}


def _update_input(body: dict[str, Any], given: Mapping[str, Any], turn: TurnConfig) -> None:
    where = "session.audio.input"
    if "format" in given:
        body["format"] = audio_format(given["format"], f"{where}.format")
    for name in ("transcription", "noise_reduction"):
        if name in given:
            value = given[name]
            body[name] = None if value is None else dict(_mapping(value, f"{where}.{name}"))
    if "turn_detection" in given:
        body["turn_detection"] = _detection(given["turn_detection"], body["turn_detection"], turn)


def _update_output(body: dict[str, Any], given: Mapping[str, Any], spoken: bool) -> None:
    where = "session.audio.output"
    if "format" in given:
        body["format"] = audio_format(given["format"], f"{where}.format")
    if "voice" in given:
        voice = given["voice"].get("id") if isinstance(given["voice"], Mapping) else given["voice"]
        if not isinstance(voice, str):
            raise EventError(f"{where}.voice is {_short(voice)}; send its name", f"{where}.voice")
        if spoken and voice != body["voice"]:
            raise EventError(
                "the voice cannot change after the session has spoken", f"{where}.voice", "cannot_update_voice"
            )
        body["voice"] = voice  # the model has one voice; its name is echoed
    if "speed" in given:
        if given["speed"] not in (None, 1, 1.0):
            raise EventError(f"{where}.speed is {_short(given['speed'])}; this model speaks at 1.0", f"{where}.speed")
        body["speed"] = 1.0


def _vad(turn: TurnConfig) -> dict[str, Any]:
    return {
        "type": "server_vad",
        "threshold": turn.threshold,
        "prefix_padding_ms": turn.prefix_ms,
        "silence_duration_ms": turn.silence_ms,
        "idle_timeout_ms": None,
        "create_response": True,
        "interrupt_response": True,
    }


def _detection(value: Any, before: dict[str, Any] | None, turn: TurnConfig) -> dict[str, Any] | None:
    where = "session.audio.input.turn_detection"
    if value is None:
        return None
    given = _mapping(value, where)
    kind = given.get("type", (before or {}).get("type", "server_vad"))
    flags = {"create_response": True, "interrupt_response": True}
    if kind == "semantic_vad":
        eagerness = given.get("eagerness") or "auto"
        if not isinstance(eagerness, str) or eagerness not in _EAGERNESS_MS:
            raise EventError(f"{where}.eagerness is {_short(eagerness)}; one of {', '.join(_EAGERNESS_MS)}", where)
        found: dict[str, Any] = {"type": kind, "eagerness": eagerness, **flags}
    elif kind == "server_vad":
        found = dict(before) if before and before.get("type") == kind else _vad(turn)
        ranges = {
            "threshold": (0.01, 0.99),
            "prefix_padding_ms": (0, 5000),
            "silence_duration_ms": (100, 10_000),
            "idle_timeout_ms": (1000, 600_000),
        }
        for name, (low, high) in ranges.items():
            if given.get(name) is None:
                if name == "idle_timeout_ms" and name in given:
                    found[name] = None
                continue
            number = given[name]
            if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
                raise EventError(f"{where}.{name} is {_short(number)}; choose {low}..{high}", f"{where}.{name}")
            found[name] = number if name == "threshold" else int(number)
    else:
        raise EventError(f"{where}.type is {_short(kind)}; one of server_vad, semantic_vad, or null for none", where)
    for name in flags:
        if isinstance(given.get(name), bool):
            found[name] = given[name]
    return found


def _omni(value: Any, before: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    given = _mapping(value, "session.omni")
    found = dict(before or _OMNI_DEFAULTS)
    for name, setting in given.items():
        number = isinstance(setting, int) and not isinstance(setting, bool)
        if (name == "speculate_ms" and number and 50 <= setting <= 10_000) or (
            name in _OMNI_DEFAULTS and isinstance(setting, bool)
        ):
            found[name] = setting
        else:
            known = ", ".join([*_OMNI_DEFAULTS, "speculate_ms"])
            raise EventError(f"session.omni.{name[:40]} is {_short(setting)}; fields are {known}", "session.omni")
    return found


def _from_beta(given: Mapping[str, Any]) -> dict[str, Any]:
    """The general-availability form of either form."""
    out = dict(given)
    audio = {
        name: dict(_mapping(part, f"session.audio.{name}"))
        for name, part in dict(_mapping(out.get("audio"), "session.audio")).items()
    }
    heard, said = audio.setdefault("input", {}), audio.setdefault("output", {})
    for name, part, target in (
        ("input_audio_format", heard, "format"),
        ("output_audio_format", said, "format"),
    ):
        if name in out:
            known = out.pop(name)
            if known not in _BETA_FORMATS:
                raise EventError(
                    f"session.{name} is {_short(known)}; one of {', '.join(_BETA_FORMATS)}", f"session.{name}"
                )
            part[target] = {"type": _BETA_FORMATS[known]}
    for name, part, target in (
        ("input_audio_transcription", heard, "transcription"),
        ("input_audio_noise_reduction", heard, "noise_reduction"),
        ("turn_detection", heard, "turn_detection"),
        ("voice", said, "voice"),
        ("speed", said, "speed"),
    ):
        if name in out:
            part[target] = out.pop(name)
    if "modalities" in out:
        out["output_modalities"] = out.pop("modalities")
    if "max_response_output_tokens" in out:
        out["max_output_tokens"] = out.pop("max_response_output_tokens")
    return out | {"audio": audio}


def format_of(body: Mapping[str, Any]) -> Format:
    """The format of a format object."""
    return Format(body["type"], body.get("rate", 8000))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise EventError(f"{where} is {_short(value)}; send an object", where)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
