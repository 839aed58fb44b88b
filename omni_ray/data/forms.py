"""Forms of a source: what the recipe makes of its samples before the chat template sees them (networks.md section 5).

A sound with its words becomes dictation (``asr``), reading aloud (``tts``) or either by chance (``asr_tts``), or a task
for the audio encoder (``understand``); a film with its sound becomes the chunked interleave (``chunked``). What is left
to chance is drawn from a generator that knows seed, source, number and pass: it differs from pass to pass, and is the
same in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

FormName = Literal["as_is", "asr", "tts", "asr_tts", "understand", "chunked", "interleave"]
CHANCE_FORMS = frozenset({"asr", "tts", "asr_tts", "understand", "interleave"})
"""Forms that leave something to chance."""
DEFAULT_PROMPTS: Mapping[str, tuple[str, ...]] = {
    "asr": ("write down what is said", "what is said", "transcribe the speech"),
    "tts": ("say ", "read aloud: "),
    "understand": ("what do you hear", "describe the sound", "answer the voice"),
}
_SOUNDS = ("audio", "speech")


def chance_of(seed: int, source: str, index: int, turn: int) -> int:
    """Seed of what a sample leaves to chance in one pass: 128 bits."""
    digest = hashlib.sha256(f"chance/{seed}/{source}/{index}/{turn}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def shaped(sample: Sample, form: str, chance: int, prompts: Sequence[str] = ()) -> Sample:
    """The sample in a form.

    Args:
        sample: As its source yields it.  form: One of ``FormName``.  chance: From :func:`chance_of`.
        prompts: Wordings to choose from; none = the form's own.
    Raises:
        DataError: the sample lacks what the form needs.
    """
    if form == "as_is":
        return sample
    if form not in _FORMS:
        raise DataError(f"there is no form {form!r}; forms are {', '.join(get_args(FormName))}")
    return _FORMS[form](sample, np.random.Generator(np.random.Philox(key=chance)), prompts)


def _asr(sample: Sample, chance: np.random.Generator, prompts: Sequence[str]) -> Sample:
    """Codec rows in, words out."""
    name, words = _sound_and_words(sample)
    asked = [{"type": "speech", "media": name}, _text(_wording("asr", chance, prompts))]
    return _turn(sample, "asr", asked, {"role": "assistant", "content": [_text(words)]})


def _tts(sample: Sample, chance: np.random.Generator, prompts: Sequence[str]) -> Sample:
    """Words in, codec rows with the words beside them out."""
    name, words = _sound_and_words(sample)
    asked = [_text(_wording("tts", chance, prompts) + words)]
    spoken = {"type": "speech", "media": name, "text": words}
    return _turn(sample, "tts", asked, {"role": "voice", "content": [spoken]})


def _asr_tts(sample: Sample, chance: np.random.Generator, prompts: Sequence[str]) -> Sample:
    if prompts:
        raise DataError(
            f"sample {sample.key}: asr_tts asks in two ways; give prompts to a source of asr or tts instead"
        )
    return (_asr if chance.random() < 0.5 else _tts)(sample, chance, prompts)


def _understand(sample: Sample, chance: np.random.Generator, prompts: Sequence[str]) -> Sample:
    """Task prompt, sound, response (Stage 5): loss falls on the response alone."""
    name, words = _sound_and_words(sample)
    asked = [_text(_wording("understand", chance, prompts)), {"type": "audio", "media": name}]
    return _turn(sample, "understand", asked, {"role": "assistant", "content": [_text(words)]})


def _chunked(sample: Sample, chance: np.random.Generator, prompts: Sequence[str]) -> Sample:
    """Every film that a sound follows becomes one item with the sound between its frames."""
    return replace(sample, messages=tuple(_joined(message) for message in sample.messages))


def _joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content", ())
    if isinstance(content, str):
        return message
    parts: list[Mapping[str, Any]] = []
    for part in content:
        before = parts[-1] if parts else {}
        if before.get("type") == "video" and part.get("type") == "audio":
            parts[-1] = {**before, "type": "audio_visual", "sound": part.get("media")}
        else:
            parts.append(part)
    return {**message, "content": parts}


def _interleave(sample: Sample, chance: np.random.Generator, prompts: Sequence[str]) -> Sample:
    """Sounds with their words, in order, as running speech and text; the template drops sides of them."""
    fragments = [
        {"text": part["text"], "media": part["media"]}
        for message in sample.messages
        for part in _parts(message)
        if part.get("type") in _SOUNDS and part.get("text")
    ]
    fragments += [f for message in sample.messages for part in _parts(message) for f in part.get("fragments", ())]
    if not fragments:
        raise DataError(f"sample {sample.key} has no sounds with their words to interleave")
    message = {"role": "text", "content": [{"type": "fragments", "fragments": fragments}]}
    return replace(sample, kind="interleave", messages=(message,))


def _turn(sample: Sample, kind: str, asked: list[dict[str, Any]], answer: dict[str, Any]) -> Sample:
    return replace(sample, kind=kind, messages=({"role": "user", "content": asked}, answer))


def _sound_and_words(sample: Sample) -> tuple[str, str]:
    """The first sound, and what is said in it: beside it, or in the first answer."""
    sound: Mapping[str, Any] | None = None
    answer = ""
    for message in sample.messages:
        for part in _parts(message):
            if sound is None and part.get("type") in _SOUNDS:
                sound = part
            if not answer and message.get("role") in ("assistant", "voice") and part.get("type") == "text":
                answer = str(part.get("text", ""))
    words = str(sound.get("text") or answer).strip() if sound is not None else ""
    if sound is None or not words:
        raise DataError(f"sample {sample.key} has no sound with words beside it or in an answer; use form as_is")
    return str(sound["media"]), words


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content", ())
    return [_text(content)] if isinstance(content, str) else [part for part in content if isinstance(part, Mapping)]


def _wording(form: str, chance: np.random.Generator, prompts: Sequence[str]) -> str:
    choices = prompts or DEFAULT_PROMPTS[form]
    return choices[int(chance.integers(len(choices)))]


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


_FORMS: Mapping[str, Callable[[Sample, np.random.Generator, Sequence[str]], Sample]] = {
    "asr": _asr,
    "tts": _tts,
    "asr_tts": _asr_tts,
    "understand": _understand,
    "chunked": _chunked,
    "interleave": _interleave,
}
