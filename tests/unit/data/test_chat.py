"""The chat template row by row: placeholders, spans, labels, loss terms, counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from omni_ray.config.model import model_preset
from omni_ray.data.audio import encode_flac
from omni_ray.data.chat import (
    COUNT_NAMES,
    answer_text,
    encode_sample,
    fill_codec_rows,
    generation_prompt,
    loss_counts,
    undo_delay,
)
from omni_ray.data.image import encode_png
from omni_ray.data.tiny_world.corpus import template_texts
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.data.video import encode_mp4
from omni_ray.types.batch import IGNORE, LossKind
from omni_ray.types.errors import DataError, MediaError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, Sample

MODEL = model_preset("tiny")
TOKENIZER = Tokenizer.learn(template_texts())
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id
# 0.5 s = 8,000 samples: 48 fbank frames = 6 audio rows; 9 codec frames = 10 rows
FLAC = encode_flac(0.3 * np.sin(np.arange(8000) / 7).astype(np.float32), 16000)
PNG = encode_png(np.zeros((56, 56, 3), dtype=np.uint8))
MP4 = encode_mp4(np.zeros((4, 56, 56, 3), dtype=np.uint8), 4)
MEDIA = {"a.png": PNG, "q.flac": FLAC, "c.mp4": MP4, "s.flac": FLAC, "t.flac": FLAC}


def _text(words: str, **more: str) -> dict[str, str]:
    return {"type": "text", "text": words, **more}


def _part(kind: str, media: str, **more: str) -> dict[str, str]:
    return {"type": kind, "media": media, **more}


def _encode(*messages: tuple[str, list[Mapping[str, Any]]], kind: str = "task") -> EncodedSample:
    listed = tuple({"role": role, "content": parts} for role, parts in messages)
    return encode_sample(Sample(key="k", kind=kind, messages=listed, media=MEDIA), TOKENIZER, MODEL)


def _ids(*pieces: str | int) -> list[int]:
    return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else TOKENIZER.encode(piece))]


def _targets(encoded: EncodedSample) -> list[int]:
    return [int(label) for label in encoded.labels_T5[:, 0] if label != IGNORE]


def test_a_question_and_its_answer() -> None:
    encoded = _encode(("user", [_text("which digit is it")]), ("assistant", [_text("seven")]))
    wanted = _ids("USER:", "which digit is it", "\n", "ASSISTANT:", "seven", EOS, "\n")
    assert encoded.ids_T5[:, 0].tolist() == wanted
    assert (encoded.ids_T5[:, 1:] == PAD).all()
    assert _targets(encoded) == _ids("seven", EOS), "content and end, nothing else"
    row = wanted.index(TOKENIZER.encode("seven")[0])
    assert encoded.labels_T5[row - 1, 0] == wanted[row], "a label stands at the row before its token"
    assert set(encoded.loss_kind_T.tolist()) == {LossKind.NONE, LossKind.TEXT}
    assert loss_counts(encoded) == dict.fromkeys(COUNT_NAMES, 0) | {"text": 2}


def test_system_messages_and_plain_strings() -> None:
    messages = ({"role": "system", "content": "is"}, {"role": "user", "content": "it"})
    encoded = encode_sample(Sample(key="k", kind="x", messages=messages), TOKENIZER, MODEL)
    assert encoded.ids_T5[:, 0].tolist() == _ids("SYSTEM:", "is", EOS, "\n", "USER:", "it", "\n")
    assert _targets(encoded) == []


def test_plain_text_learns_every_row() -> None:
    told = _encode(("text", [_text("a red seven")]), kind="text")
    assert told.ids_T5[:, 0].tolist() == _ids(TOKENIZER.bos_id, "a red seven", EOS)
    assert _targets(told) == _ids("a red seven", EOS)
    asked = _encode(("user", [_text("it")]), ("assistant", [_text("seven")]), kind="text")
    assert _targets(asked) == asked.ids_T5[1:, 0].tolist()


def test_every_item_has_its_place() -> None:
    asked = [_part("image", "a.png"), _part("video", "c.mp4"), _part("audio", "q.flac"), _part("speech", "s.flac")]
    encoded = _encode(("user", [*asked, _text("what is it")]), ("assistant", [_text("red")]))
    image, audio = TOKENIZER.image_pad_id, TOKENIZER.audio_pad_id
    wanted = _ids(
        *("USER:", *[image] * 8, "\n"),
        *("second{0.0}:", *[image] * 8, "second{0.5}:", *[image] * 8),
        *(TOKENIZER.audio_begin_id, *[audio] * 6, TOKENIZER.audio_end_id),
        *[PAD] * 10,
        *("what is it", "\n", "ASSISTANT:", "red", EOS, "\n"),
    )
    assert encoded.ids_T5[:, 0].tolist() == wanted
    spans = [(s.modality, s.name, s.kind, s.offset, s.length, s.grid, s.frame_pair, s.target) for s in encoded.spans]
    none = (0, 0, 0)
    assert spans == [
        (Modality.VISION, "a.png", "image", 1, 8, (1, 4, 4), -1, False),
        (Modality.VISION, "c.mp4", "video", 11, 8, (1, 4, 4), 0, False),
        (Modality.VISION, "c.mp4", "video", 20, 8, (1, 4, 4), 1, False),
        (Modality.AUDIO, "q.flac", "audio", 29, 6, none, -1, False),
        (Modality.SPEECH, "s.flac", "speech", 36, 10, none, -1, False),
    ]
    assert [span.cost for span in encoded.spans] == [16, 16, 16, 6, 10]
    assert loss_counts(encoded)["vision"] == 2, "a sample with a picture counts as vision"
    assert loss_counts(encoded)["audio_0"] == 0, "what the user says is not learnt"


def test_text_in_the_place_of_a_sound() -> None:
    encoded = _encode(("user", [_text("it", **{"as": "audio"}), _text("what")]))
    begin, end = TOKENIZER.audio_begin_id, TOKENIZER.audio_end_id
    assert encoded.ids_T5[:, 0].tolist() == _ids("USER:", begin, "it", end, "what", "\n")


def test_a_spoken_answer_runs_beside_its_words() -> None:
    encoded = _encode(("user", [_text("it")]), ("voice", [_part("speech", "s.flac", text="red seven")]))
    words = _ids("red seven", EOS)
    assert encoded.ids_T5[:, 0].tolist() == _ids("USER:", "it", "\n", "VOICE ASSISTANT:", *words, *[PAD] * 7, "\n")
    (span,) = encoded.spans
    assert (span.offset, span.length, span.target) == (4, 10, True)
    assert _targets(encoded) == [*words, *[PAD] * 7]
    kinds = encoded.loss_kind_T[3:13].tolist()
    assert kinds == [LossKind.AUDIO_TEXT] * 3 + [LossKind.PAD_TEXT] * 7
    counts = loss_counts(encoded)
    assert counts == {
        **{"text": 0, "audio_text": 3, "pad_text": 7, "vision": 0},
        **{"audio_0": 10, "audio_1": 9, "audio_2": 9, "audio_3": 9},
    }
    codes = np.random.default_rng(0).integers(0, 64, (9, 4))
    ids, labels = encoded.ids_T5.copy(), encoded.labels_T5.copy()
    fill_codec_rows(ids, labels, span.offset, codes, target=span.target)
    filled = [int((labels[:, column] != IGNORE).sum()) for column in range(1, 5)]
    assert filled == [counts[f"audio_{level}"] for level in range(4)]
    assert np.array_equal(undo_delay(ids[span.offset : span.offset + span.length]), codes)
    assert np.array_equal(labels[:, 0], encoded.labels_T5[:, 0])


def test_segments_are_joined_by_pauses_and_sound_alone_teaches_no_words() -> None:
    parts = [_part("speech", "s.flac", text="red"), _part("speech", "t.flac", text="seven")]
    encoded = _encode(("user", [_text("it")]), ("voice", parts))
    column = encoded.ids_T5[4:24, 0].tolist()
    assert column[:3] == _ids("red", TOKENIZER.pause_id, PAD)
    assert column[10:13] == _ids("seven", EOS, PAD)
    alone = _encode(("user", [_text("it")]), ("voice", [_part("speech", "s.flac")]))
    assert alone.ids_T5[4:15, 0].tolist() == [PAD] * 10 + [EOS]
    assert _targets(alone) == [EOS]
    assert loss_counts(alone) == dict.fromkeys(COUNT_NAMES, 9) | {
        **{"text": 0, "audio_text": 1, "pad_text": 0, "vision": 0, "audio_0": 10}
    }


def test_terms_of_mixed_samples() -> None:
    seen = _encode(
        ("user", [_part("image", "a.png")]),
        ("assistant", [_text("red")]),
        ("user", [_text("it")]),
        ("voice", [_part("speech", "s.flac", text="red")]),
    )
    counts = loss_counts(seen)
    assert (counts["vision"], counts["audio_text"], counts["pad_text"], counts["text"]) == (2, 2, 8, 0)
    coded = _encode(("user", [_part("speech", "s.flac")]), ("assistant", [_text("red")]))
    assert loss_counts(coded)["audio_text"] == 2
    heard = _encode(("user", [_part("audio", "q.flac")]), ("assistant", [_text("red")]))
    assert loss_counts(heard)["text"] == 2


@pytest.mark.parametrize(("voice", "prefix"), [(False, "ASSISTANT:"), (True, "VOICE ASSISTANT:")])
def test_a_prompt_is_the_sample_up_to_its_answer(voice: bool, prefix: str) -> None:
    asked = {"role": "user", "content": [_part("image", "a.png"), _text("which digit is it")]}
    prompt = generation_prompt([asked], voice, TOKENIZER, MODEL, media=MEDIA)
    assert prompt.ids_T5[-1, 0] == TOKENIZER.encode(prefix)[0]
    assert (prompt.labels_T5 == IGNORE).all()
    assert sum(loss_counts(prompt).values()) == 0
    answer = [_part("speech", "s.flac", text="red")] if voice else [_text("red")]
    whole = _encode(("user", asked["content"]), ("voice" if voice else "assistant", answer))
    assert whole.ids_T5[: len(prompt)].tolist() == prompt.ids_T5.tolist()
    assert whole.spans[:1] == prompt.spans


def test_an_answer_is_read_up_to_its_end() -> None:
    assert answer_text([*_ids("red seven"), PAD, PAD, EOS, *_ids("blue")], TOKENIZER) == "red seven"
    assert answer_text(_ids(TOKENIZER.pause_id, "red", TOKENIZER.image_pad_id), TOKENIZER) == "red"


@pytest.mark.parametrize(
    ("role", "content", "why"),
    [
        ("robot", [_text("it")], "has a message of role 'robot'; roles are system, user"),
        ("user", [{"type": "smell"}], "has a part of type 'smell'"),
        ("user", [_part("image", "b.png")], "speaks of 'b.png', yet its media are a.png, c.mp4"),
        ("user", [{"type": "image"}], "has a part of type image that names no media"),
        ("user", [{"type": "text"}], "has a text part without text"),
        ("user", [3], "it must be text or a list of parts"),
        ("voice", [_part("speech", "s.flac", text="seven" + " seven" * 19)], "has 21 text tokens beside 10 codec rows"),
    ],
)
def test_what_cannot_be_encoded_is_refused(role: str, content: list[Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        _encode((role, content))


def test_unreadable_media_name_the_sample() -> None:
    messages = ({"role": "user", "content": [_part("image", "a.png")]},)
    with pytest.raises(MediaError, match=r"k-7/a.png is not a picture"):
        encode_sample(Sample(key="k-7", kind="x", messages=messages, media={"a.png": b"no"}), TOKENIZER, MODEL)
