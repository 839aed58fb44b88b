"""The worked example of the chunked audio-visual form, sparse frames before the next turn, speech between words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from omni_ray.config.model import model_preset
from omni_ray.data.audio import encode_flac
from omni_ray.data.chat import encode_sample, generation_prompt, loss_counts
from omni_ray.data.image import encode_png
from omni_ray.data.interleave import Chunk, chunks, drop_fragments
from omni_ray.data.media import decode_spans, sound_rows
from omni_ray.data.tiny_world.corpus import template_texts
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.data.video import encode_mp4
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.types.batch import IGNORE, LossKind
from omni_ray.types.errors import DataError, MediaError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, Sample

MODEL = model_preset("tiny")
TOKENIZER = Tokenizer.learn(template_texts())
BEGIN, END, SEEN, HEARD = (
    TOKENIZER.audio_begin_id,
    TOKENIZER.audio_end_id,
    TOKENIZER.image_pad_id,
    TOKENIZER.audio_pad_id,
)


def sound(seconds: float) -> bytes:
    return encode_flac(0.3 * np.sin(np.arange(round(16000 * seconds)) / 7).astype(np.float32), 16000)


def film(seconds: float, height: int = 84, width: int = 168, fps: int = 2) -> bytes:
    """Every frame has a brightness of its own."""
    count = round(seconds * fps)
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    frames += (np.arange(count, dtype=np.uint8) * 8)[:, None, None, None]
    return encode_mp4(frames, fps)


MEDIA = {
    "film.mp4": film(3),
    "long.mp4": film(10),
    "q.flac": sound(2.4),
    "q1.flac": sound(1.0),
    "p.png": encode_png(np.zeros((56, 56, 3), np.uint8)),
}


def ids(*pieces: str | int | list[int]) -> list[int]:
    out: list[int] = []
    for piece in pieces:
        out += TOKENIZER.encode(piece) if isinstance(piece, str) else [piece] if isinstance(piece, int) else piece
    return out


def prompt(*content: dict[str, Any]) -> EncodedSample:
    return generation_prompt([{"role": "user", "content": list(content)}], True, TOKENIZER, MODEL, media=MEDIA)


def test_the_worked_example() -> None:
    """36 visual tokens a pair, 2.4 s = 30 sound rows over three pairs: 12, 13 and the 5 that remain."""
    encoded = prompt({"type": "audio_visual", "media": "film.mp4", "sound": "q.flac"})
    assert encoded.ids_T5[:, 0].tolist() == ids(
        *("USER:", "second{0.0}:", [SEEN] * 36, BEGIN, [HEARD] * 12),
        *("second{1.0}:", [SEEN] * 36, [HEARD] * 13),
        *("second{2.0}:", [SEEN] * 36, [HEARD] * 5, END),
        *("\n", "VOICE ASSISTANT:"),
    )
    heard = [(s.first_row, s.length, s.of_rows) for s in encoded.spans if s.modality == Modality.AUDIO]
    assert heard == [(0, 12, 30), (12, 13, 30), (25, 5, 30)]


def test_sparse_frames_of_the_answer_open_the_next_turn() -> None:
    """A 4 s answer that starts at 3 s: frames at 3 and 5 s stand alone, at 7 s the next turn's sound begins."""
    encoded = prompt(
        {"type": "video", "media": "long.mp4", "from_s": 3, "until_s": 7, "every_s": 2},
        {"type": "audio_visual", "media": "long.mp4", "from_s": 7, "until_s": 8, "sound": "q1.flac"},
    )
    assert encoded.ids_T5[:, 0].tolist() == ids(
        *("USER:", "second{3.0}:", [SEEN] * 36, "second{5.0}:", [SEEN] * 36),
        *("second{7.0}:", [SEEN] * 36, BEGIN, [HEARD] * 13, END, "\n", "VOICE ASSISTANT:"),
    )
    assert [span.frames for span in encoded.spans if span.frames] == [(6, 6), (10, 10), (14, 15)]
    media = decode_spans(Sample(key="k", kind="x", messages=(), media=MEDIA), encoded.spans, MODEL)
    levels = [[float(frame.mean()) for frame in pair] for pair in media[:3]]
    assert np.abs(np.array(levels) - 8.0 * np.array([(6, 6), (10, 10), (14, 15)])).max() < 4


def test_the_alternation_goes_on() -> None:
    rows = [chunk.rows for chunk in chunks([float(t) for t in range(6)], 75, 12.5)]
    assert rows == [12, 13, 12, 13, 12, 13]
    assert chunks([0.0], 30, 12.5) == [Chunk(pair=0, first=0, rows=30)], "sound beyond the film stays in the last"


@pytest.mark.parametrize(("rows", "alone"), [(25, 3), (26, 2), (1, 4), (62, 0), (90, 0)])
def test_a_film_longer_than_its_sound_opens_with_frames_alone(rows: int, alone: int) -> None:
    cut = chunks([0.0, 1.0, 2.0, 3.0, 4.0], rows, 12.5)
    assert [chunk.rows == 0 for chunk in cut] == [i < alone for i in range(5)]
    assert sum(chunk.rows for chunk in cut) == rows
    assert [chunk.first for chunk in cut[alone:]] == np.cumsum([0, *(c.rows for c in cut[alone:-1])]).tolist()


def test_parts_of_a_sound_are_the_rows_of_the_whole() -> None:
    encoded = prompt({"type": "audio_visual", "media": "film.mp4", "sound": "q.flac"})
    sample = Sample(key="k", kind="x", messages=(), media=MEDIA)
    spans = [span for span in encoded.spans if span.modality == Modality.AUDIO]
    parts = decode_spans(sample, spans, MODEL)
    torch.manual_seed(0)
    network = AudioEncoder(MODEL.audio).eval()
    rows_ID, lengths = sound_rows(network, parts)
    whole_ID, whole = network([torch.from_numpy(parts[0].wave)])
    assert lengths == (12, 13, 5)
    assert tuple(whole) == (30,)
    assert torch.equal(rows_ID, whole_ID), "one run, cut"
    one = sound_rows(network, parts[1:2])[0]
    assert torch.equal(one, whole_ID[12:25])
    mixed_ID, mixed = sound_rows(network, [parts[0].wave, *parts])
    assert mixed == (30, 12, 13, 5)
    assert torch.allclose(mixed_ID, torch.cat([whole_ID, whole_ID]), atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sound for a window": (
        {"type": "audio_visual", "media": "long.mp4", "from_s": 2},
        "name the sound of that window",
    ),
    "backwards": ({"type": "video", "media": "long.mp4", "from_s": 3, "until_s": 2}, "which holds no time"),
    "words": ({"type": "video", "media": "long.mp4", "from_s": "soon"}, "from_s, until_s and every_s are seconds"),
    "too late": ({"type": "video", "media": "film.mp4", "from_s": 30}, "ends after 2.5 s, before the window at 30 s"),
    "missing": ({"type": "audio_visual", "media": "film.mp4", "sound": "no.flac"}, "speaks of 'no.flac', yet"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str) -> None:
    part, sentence = REFUSED[what]
    with pytest.raises((DataError, MediaError)) as caught:
        prompt(part)
    assert sentence in str(caught.value)


FRAGMENTS = [{"text": word, "media": "q1.flac"} for word in ("red", "blue", "seven", "two")]


def interleaved(chance: int) -> EncodedSample:
    content = [{"type": "fragments", "fragments": FRAGMENTS}]
    sample = Sample(key="k", kind="interleave", messages=({"role": "text", "content": content},), media=MEDIA)
    return encode_sample(sample, TOKENIZER, MODEL, chance)


def test_fragments_drop_one_side_at_random() -> None:
    seen = set()
    for seed in range(200):
        parts = drop_fragments(FRAGMENTS, np.random.default_rng(seed))
        forms = tuple("T" if p["type"] == "text" else "A+T" if "text" in p else "A" for p in parts)
        assert not {"T", "A"} <= set(forms), "one side, never both"
        assert "A+T" in forms
        assert len(set(forms)) == 2
        seen.add(forms)
    assert {("T", "A+T", "T", "A+T"), ("A", "A+T", "A", "A+T")} <= seen
    assert len(seen) == 2 * (2**4 - 2)


def test_interleaved_speech_learns_words_and_codes() -> None:
    rows = 18  # 1 s is 17 codec frames
    for chance in range(8):
        encoded = interleaved(chance)
        text = encoded.ids_T5[:, 0]
        assert text[0] == TOKENIZER.bos_id
        assert text[-1] == TOKENIZER.eos_id
        spans = [s for s in encoded.spans if s.modality == Modality.SPEECH]
        assert all(span.target and span.length == rows for span in spans)
        for span in spans:
            inside = slice(span.offset - 1, span.offset + rows - 1)
            words = text[span.offset : span.offset + rows]
            if TOKENIZER.pause_id in words:
                assert (encoded.labels_T5[inside, 0] == words).all()
            else:
                assert (words == TOKENIZER.pad_id).all()
                assert (encoded.labels_T5[inside, 0] == IGNORE).all(), "no text is due beside a sound alone"
        counts = loss_counts(encoded)
        assert counts["audio_0"] == rows * len(spans)
        assert set(encoded.loss_kind_T.tolist()) <= {LossKind.NONE, LossKind.AUDIO_TEXT, LossKind.PAD_TEXT}
        again = interleaved(chance)
        assert np.array_equal(again.ids_T5, encoded.ids_T5)
    assert len({interleaved(chance).ids_T5.tobytes() for chance in range(8)}) > 3


def test_pictures_between_words_learn_the_words() -> None:
    content = [
        {"type": "text", "text": "a red"},
        {"type": "image", "media": "p.png"},
        {"type": "text", "text": "seven"},
    ]
    sample = Sample(key="k", kind="interleave", messages=({"role": "text", "content": content},), media=MEDIA)
    encoded = encode_sample(sample, TOKENIZER, MODEL)
    eight = [SEEN] * 8
    assert encoded.ids_T5[:, 0].tolist() == ids(TOKENIZER.bos_id, "a red", eight, "\n", "seven", TOKENIZER.eos_id)
    learnt = [int(label) for label in encoded.labels_T5[:, 0] if label != IGNORE]
    assert learnt == ids("a red", "\n", "seven", TOKENIZER.eos_id), "never a placeholder"
    assert set(encoded.loss_kind_T.tolist()) == {LossKind.NONE, LossKind.VISION}


def test_fragments_that_are_none_are_refused() -> None:
    sample = Sample(key="k", kind="interleave", messages=({"role": "text", "content": [{"type": "fragments"}]},))
    with pytest.raises(DataError, match="sample k has fragments that are no list of"):
        encode_sample(sample, TOKENIZER, MODEL)
