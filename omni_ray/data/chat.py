"""The chat template: a sample to rows, labels and media spans, and a prompt to rows (networks.md section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_ray.config.model import OmniConfig
from omni_ray.data.audio import FRAME_SHIFT_S, audio_rows, codec_frames, count_samples
from omni_ray.data.codec_rows import fill_codec_rows, undo_delay
from omni_ray.data.image import image_grid, image_tokens
from omni_ray.data.interleave import chunks, drop_fragments
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.data.video import plan_video
from omni_ray.data.windows import WORDS as WINDOW_WORDS
from omni_ray.data.windows import plan_window, window_of
from omni_ray.types.batch import AUDIO_PAD, IGNORE, NUM_CODEBOOKS, LossKind
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, MediaSpan, Sample

__all__ = [
    "COUNT_NAMES",
    "answer_text",
    "encode_sample",
    "fill_codec_rows",
    "generation_prompt",
    "loss_counts",
    "undo_delay",
]

PREFIXES: Mapping[str, str] = {
    "system": "SYSTEM:",
    "user": "USER:",
    "assistant": "ASSISTANT:",
    "voice": "VOICE ASSISTANT:",
    "text": "",
}
"""What stands before a message; ``text`` is running text, which opens with the begin token instead."""
WHOLE_KINDS = frozenset({"text", "interleave"})
"""Samples of these kinds learn every row, questions included; in ``interleave`` pictures or sounds stand between."""
PART_TYPES = ("text", "image", "video", "audio", "audio_visual", "speech", "fragments")
COUNT_NAMES = ("text", "audio_text", "pad_text", "vision", "audio_0", "audio_1", "audio_2", "audio_3")
"""Loss terms in the order of plans."""
_VISUAL = frozenset({"image", "video", "audio_visual"})


def encode_sample(sample: Sample, tokenizer: Tokenizer, model: OmniConfig, chance: int = 0) -> EncodedSample:
    """Rows, shifted labels and media spans of a sample; media headers are read, nothing is encoded.

    Loss falls on the content and end of ``assistant`` and ``voice`` messages, and on every row of kind ``text``. The
    text head's term is AUDIO_TEXT inside codec answers (PAD_TEXT on their pad rows), VISION in samples with a picture
    or a video, AUDIO_TEXT in other samples with codec rows, else TEXT. Codec columns hold PAD until
    :func:`fill_codec_rows` writes them.

    Args:
        sample: What a source yields.  tokenizer: Text to ids.  model: Sizes.
        chance: Seed of what the sample leaves to chance (which side of its fragments is dropped).
    Raises:
        DataError: a role, part or member that is not there, or a text longer than its speech.
        MediaError: media that cannot be read.
    """
    writer = _Writer(sample, tokenizer, model, chance)
    for message in writer.messages:
        writer.message(message)
    return writer.finish()


def generation_prompt(
    messages: Sequence[Mapping[str, Any]],
    voice: bool,
    tokenizer: Tokenizer,
    model: OmniConfig,
    *,
    media: Mapping[str, bytes] | None = None,
    key: str = "prompt",
) -> EncodedSample:
    """A conversation as rows that end in ``ASSISTANT:`` or ``VOICE ASSISTANT:``; no row carries a label.

    Raises:
        DataError, MediaError: as :func:`encode_sample`.
    """
    sample = Sample(key=key, kind="prompt", messages=tuple(messages), media=media or {})
    writer = _Writer(sample, tokenizer, model)
    for message in writer.messages:
        writer.message(message)
    writer.plain(tokenizer.encode(PREFIXES["voice" if voice else "assistant"]))
    return writer.finish(labelled=False)


def answer_text(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """What a generated text column says: up to the end token, pads, pauses and placeholders left out."""
    kept = []
    for token in ids:
        if int(token) == tokenizer.eos_id:
            break
        kept.append(int(token))
    return tokenizer.decode(kept).strip()


def loss_counts(encoded: EncodedSample) -> dict[str, int]:
    """Rows with a target per loss term; a codec answer of N frames counts N + 1 for head 0 and N for heads 1 to 3."""
    kinds = {
        "text": LossKind.TEXT,
        "audio_text": LossKind.AUDIO_TEXT,
        "pad_text": LossKind.PAD_TEXT,
        "vision": LossKind.VISION,
    }
    rows_by_kind = np.bincount(encoded.loss_kind_T[encoded.labels_T5[:, 0] != IGNORE], minlength=len(LossKind))
    counts = {name: int(rows_by_kind[kind]) for name, kind in kinds.items()}
    rows = [span.length for span in encoded.spans if span.target]
    counts["audio_0"] = sum(rows)
    return counts | {f"audio_{level}": sum(rows) - len(rows) for level in range(1, NUM_CODEBOOKS)}


@dataclass(frozen=True, slots=True)
class _Pair:
    """One pair of frames of a film: when, how many patches, and which (by number in the plan, or by frames)."""

    time_s: float
    grid: tuple[int, int]
    number: int
    frames: tuple[int, ...] = ()


class _Writer:
    """Collects rows: the text id, and the loss term under which that id is a target of the row before."""

    def __init__(self, sample: Sample, tokenizer: Tokenizer, model: OmniConfig, chance: int = 0) -> None:
        self.sample, self.tokenizer, self.model = sample, tokenizer, model
        self.chance = chance
        self.ids: list[int] = []
        self.terms: list[int] = []  # of LossKind, which numpy reads ten times as slowly as whole numbers
        self.spans: list[MediaSpan] = []
        self.all_rows = sample.kind in WHOLE_KINDS
        self.messages = [self._expanded(message) for message in sample.messages]
        kinds = {part.get("type") for message in self.messages for part in self._parts(message)}
        if kinds & _VISUAL:
            self.term = LossKind.VISION
        else:
            self.term = LossKind.AUDIO_TEXT if "speech" in kinds else LossKind.TEXT

    def message(self, message: Mapping[str, Any]) -> None:
        """One turn: prefix, parts, end token for whoever ends, newline."""
        role = str(message.get("role"))
        if role not in PREFIXES:
            raise self._error(f"has a message of role {role!r}; roles are {', '.join(PREFIXES)}")
        if role == "text":
            self.plain([self.tokenizer.bos_id])
        self.plain(self.tokenizer.encode(PREFIXES[role]))
        learn = role in ("assistant", "voice") or (role == "text" and self.all_rows)
        parts = self._parts(message)
        speaks = role == "voice" or (role == "text" and self.all_rows)
        segments = [i for i, part in enumerate(parts) if speaks and part.get("type") == "speech"]
        ended = False
        for i, part in enumerate(parts):
            if i in segments:
                last = role == "voice" and i == segments[-1] and i == len(parts) - 1
                ended = self._speech_answer(part, final=last)
            else:
                self._part(part, learn)
        if role != "user" and not ended:
            self._add([self.tokenizer.eos_id], learn)
        if role != "text":
            self.plain(self.tokenizer.encode("\n"))

    def plain(self, ids: Sequence[int]) -> None:
        """Rows without loss, unless every row has it."""
        self._add(ids, learn=False)

    def finish(self, *, labelled: bool = True) -> EncodedSample:
        """Shift the targets by one and freeze."""
        count = len(self.ids)
        ids_T5 = np.full((count, 1 + NUM_CODEBOOKS), AUDIO_PAD, dtype=np.int64)
        ids_T5[:, 0] = self.ids
        labels_T5 = np.full_like(ids_T5, IGNORE)
        loss_kind_T = np.zeros(count, dtype=np.int64)
        if labelled and count > 1:
            terms = np.array(self.terms, dtype=np.int64)[1:]
            loss_kind_T[:-1] = terms
            labels_T5[:-1, 0] = np.where(terms != LossKind.NONE, ids_T5[1:, 0], IGNORE)
        return EncodedSample(
            key=self.sample.key,
            kind=self.sample.kind,
            ids_T5=ids_T5,
            labels_T5=labels_T5,
            loss_kind_T=loss_kind_T,
            spans=tuple(self.spans),
        )

    def _part(self, part: Mapping[str, Any], learn: bool) -> None:
        kind = part.get("type")
        if kind == "text":
            self._text(part, learn)
        elif kind == "image":
            self._image(self._name(part))
        elif kind == "video":
            self._video(part)
        elif kind == "audio":
            self._audio(self._name(part))
        elif kind == "audio_visual":
            self._audio_visual(part)
        elif kind == "speech":
            self._speech_heard(self._name(part))
        else:
            raise self._error(f"has a part of type {kind!r}; types are {', '.join(PART_TYPES)}")

    def _text(self, part: Mapping[str, Any], learn: bool) -> None:
        if not isinstance(part.get("text"), str):
            raise self._error("has a text part without text")
        ids = self.tokenizer.encode(part["text"])
        if part.get("as") == "audio":
            ids = [self.tokenizer.audio_begin_id, *ids, self.tokenizer.audio_end_id]
        self._add(ids, learn)

    def _image(self, name: str) -> None:
        config = self.model.vision
        grid = image_grid(self._media(name), self._where(name), config)
        self._visual(name, "image", grid, -1)
        self.plain(self.tokenizer.encode("\n"))

    def _video(self, part: Mapping[str, Any]) -> None:
        name = self._name(part)
        for pair in self._pairs(part, name):
            self._pair(name, pair)

    def _pairs(self, part: Mapping[str, Any], name: str) -> list[_Pair]:
        """Pairs of frames of a film, or of the window of it that the part names."""
        window = window_of(part, self._where(name))
        if window is None:
            plan = plan_video(self._media(name), self._where(name), self.model.vision)
            return [_Pair(time_s, plan.grid[1:], number) for number, time_s in enumerate(plan.times_s)]
        chosen = plan_window(self._media(name), self._where(name), window, self.model.vision)
        return [
            _Pair(time_s, chosen.grid, -1, frames) for time_s, frames in zip(chosen.times_s, chosen.frames, strict=True)
        ]

    def _pair(self, name: str, pair: _Pair) -> None:
        self.plain(self.tokenizer.encode(f"second{{{pair.time_s:.1f}}}:"))
        self._visual(name, "video", (1, *pair.grid), pair.number, pair.frames)

    def _audio_visual(self, part: Mapping[str, Any]) -> None:
        """Frames and sound chunk by chunk; the sound's marks stand before its first part and after its last."""
        name, sound = self._name(part), str(part.get("sound", part.get("media")))
        if "sound" not in part and any(part.get(word) is not None for word in WINDOW_WORDS):
            raise self._error(f'shows a window of {name}; name the sound of that window by "sound"')
        audio, pairs = self.model.audio, self._pairs(part, name)
        rows = audio_rows(self._samples(sound, audio.sample_rate_hz), audio)
        begun = False
        for chunk in chunks([pair.time_s for pair in pairs], rows, 1.0 / (audio.stride * FRAME_SHIFT_S)):
            self._pair(name, pairs[chunk.pair])
            if chunk.rows == 0:
                continue
            if not begun:
                self.plain([self.tokenizer.audio_begin_id])
                begun = True
            self._span(
                Modality.AUDIO, sound, "audio", chunk.rows, float(chunk.rows), first_row=chunk.first, of_rows=rows
            )
            self._placeholders(self.tokenizer.audio_pad_id, chunk.rows)
        self.plain([self.tokenizer.audio_end_id])

    def _visual(
        self, name: str, kind: str, grid: tuple[int, int, int], pair: int, frames: tuple[int, ...] = ()
    ) -> None:
        rows, cost = image_tokens(grid, self.model.vision), float(grid[0] * grid[1] * grid[2])
        self._span(Modality.VISION, name, kind, rows, cost, grid=grid, frame_pair=pair, frames=frames)
        self._placeholders(self.tokenizer.image_pad_id, rows)

    def _audio(self, name: str) -> None:
        rows = audio_rows(self._samples(name, self.model.audio.sample_rate_hz), self.model.audio)
        self.plain([self.tokenizer.audio_begin_id])
        self._span(Modality.AUDIO, name, "audio", rows, float(rows))
        self._placeholders(self.tokenizer.audio_pad_id, rows)
        self.plain([self.tokenizer.audio_end_id])

    def _speech_heard(self, name: str) -> None:
        rows = codec_frames(self._samples(name, self.model.codec.sample_rate_hz), self.model.codec) + 1
        self._span(Modality.SPEECH, name, "speech", rows, float(rows))
        self._placeholders(self.tokenizer.pad_id, rows)

    def _speech_answer(self, part: Mapping[str, Any], *, final: bool) -> bool:
        """Codec rows with their words beside them; True when the words end the answer."""
        name, tokenizer = self._name(part), self.tokenizer
        rows = codec_frames(self._samples(name, self.model.codec.sample_rate_hz), self.model.codec) + 1
        self._span(Modality.SPEECH, name, "speech", rows, float(rows), target=True)
        if not part.get("text"):
            # Sound alone: no word is due before it ends, so its text column teaches nothing.
            self._placeholders(tokenizer.pad_id, rows)
            return False
        words = [*tokenizer.encode(part["text"]), tokenizer.eos_id if final else tokenizer.pause_id]
        if len(words) > rows:
            raise self._error(
                f"has {len(words)} text tokens beside {rows} codec rows of {name}; split the segment or slow the speech"
            )
        pads = rows - len(words)
        self.ids += [*words, *[tokenizer.pad_id] * pads]
        self.terms += [int(LossKind.AUDIO_TEXT)] * len(words) + [int(LossKind.PAD_TEXT)] * pads
        return final

    def _span(self, modality: Modality, name: str, kind: str, length: int, cost: float, **more: Any) -> None:
        self.spans.append(
            MediaSpan(modality=modality, name=name, kind=kind, offset=len(self.ids), length=length, cost=cost, **more)
        )

    def _add(self, ids: Sequence[int], learn: bool) -> None:
        term = self.term if learn or self.all_rows else LossKind.NONE
        self.ids += ids
        self.terms += [int(term)] * len(ids)

    def _placeholders(self, token: int, rows: int) -> None:
        self.ids += [token] * rows
        self.terms += [int(LossKind.NONE)] * rows

    def _samples(self, name: str, sample_rate_hz: int) -> int:
        return count_samples(self._media(name), self._where(name), sample_rate_hz)

    def _media(self, name: str) -> bytes:
        if name not in self.sample.media:
            raise self._error(f"speaks of {name!r}, yet its media are {', '.join(sorted(self.sample.media)) or 'none'}")
        return self.sample.media[name]

    def _name(self, part: Mapping[str, Any]) -> str:
        if not isinstance(part.get("media"), str):
            raise self._error(f"has a part of type {part.get('type')} that names no media")
        return str(part["media"])

    def _where(self, name: str) -> str:
        return f"{self.sample.key}/{name}"

    @staticmethod
    def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        content = message.get("content", ())
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if not all(isinstance(part, Mapping) for part in content):
            raise DataError(f"a message's content is {content!r}; it must be text or a list of parts")
        return list(content)

    def _expanded(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message with its fragments as parts; of each fragment words or sound may have been dropped."""
        parts = self._parts(message)
        if not any(part.get("type") == "fragments" for part in parts):
            return message
        generator = np.random.Generator(np.random.Philox(key=self.chance))
        out: list[Mapping[str, Any]] = []
        for part in parts:
            if part.get("type") != "fragments":
                out.append(part)
                continue
            fragments = part.get("fragments")
            whole = isinstance(fragments, Sequence) and len(fragments) > 0
            if not whole or not all(
                isinstance(f, Mapping) and f.get("text") and f.get("media") for f in fragments or ()
            ):
                raise self._error('has fragments that are no list of {"text": words, "media": sound}')
            out += drop_fragments(fragments or (), generator)
        return {**message, "content": out}

    def _error(self, what: str) -> DataError:
        return DataError(f"sample {self.sample.key} {what}")
