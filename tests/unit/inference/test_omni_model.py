"""The single-process model: load, prepare, encode, generate, forward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import omni_ray
from omni_ray.data.audio import encode_flac
from omni_ray.data.chat import fill_codec_rows
from omni_ray.data.image import encode_png
from omni_ray.inference.omni_model import OmniModel
from omni_ray.inference.prompt import Conversation
from omni_ray.types.batch import EmbeddingBatch, OmniBatch
from omni_ray.types.errors import CheckpointError, DataError, MediaError, PlanError
from omni_ray.types.modality import Modality


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> OmniModel:
    loaded: OmniModel = omni_ray.load_model(tiny_checkpoint)
    return loaded


def picture(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def sound(seed: int, seconds: float = 0.6) -> bytes:
    wave = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    return encode_flac(wave.astype(np.float32), 16000)


def user(*parts: Mapping[str, object]) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


def conversations() -> list[Conversation]:
    text = {"type": "text", "text": "which digit is it"}
    return [
        Conversation.of([user(text)]),
        Conversation.of([user({"type": "image", "media": picture(1)}, text)]),
        Conversation.of([user({"type": "audio", "media": sound(2)}, {"type": "image", "media": picture(3)})]),
        Conversation.of([user({"type": "speech", "media": sound(4)}, text)]),
    ]


@pytest.mark.parametrize("voice", [False, True], ids=["text", "voice"])
def test_together_equals_one_by_one(model: OmniModel, voice: bool) -> None:
    together = model.generate(conversations(), voice=voice, max_tokens=6)
    for conversation, answer in zip(conversations(), together, strict=True):
        alone = model.generate(conversation.messages, media=conversation.media, voice=voice, max_tokens=6)
        assert np.array_equal(alone.ids_R5, answer.ids_R5)
        assert alone.text == answer.text
        if voice:
            assert answer.wave_S is not None
            assert answer.sample_rate_hz == 24000
            assert len(answer.wave_S) == 1440 * len(answer.codes_N4)
        else:
            assert answer.wave_S is None


def test_features_stand_in_the_rows_of_their_spans(model: OmniModel) -> None:
    prompts = [model.prepare(c) for c in conversations()]
    requests = model.requests(prompts)
    spans = [[(span.offset, span.length) for span in p.encoded.spans] for p in prompts]
    assert [[(o, len(f)) for o, f in r.features] for r in requests[1:3]] == spans[1:3]
    spoken, span = requests[3].ids_T5, prompts[3].encoded.spans[0]
    codes = model.encode(Modality.SPEECH, prompts[3].media)[0]
    want = torch.from_numpy(prompts[3].encoded.ids_T5.copy())
    fill_codec_rows(want, want, span.offset, codes, target=False)
    assert torch.equal(spoken, want)


def test_forward_places_features_and_equals_prefill(model: OmniModel) -> None:
    (request,) = model.requests([model.prepare(conversations()[1])])
    values = request.features[0][1]
    length = len(request.ids_T5)
    batch = OmniBatch(
        ids_T5=request.ids_T5,
        cu_seqlens=(0, length),
        labels_T5=request.ids_T5,
        loss_kind_T=torch.zeros(length, dtype=torch.int64),
        positions=torch.arange(length),
        features={Modality.VISION: EmbeddingBatch(values_ID=values, item_ids=(0,), lengths=(len(values),))},
    )
    hidden = model.forward(batch).hidden_TD
    torch.testing.assert_close(hidden[-1], model.engine.prefill([request])[1][0], rtol=1e-4, atol=1e-4)
    few = EmbeddingBatch(values_ID=values[1:], item_ids=(0,), lengths=(len(values) - 1,))
    wrong = OmniBatch(**{f: getattr(batch, f) for f in OmniBatch.__slots__} | {"features": {Modality.VISION: few}})
    with pytest.raises(PlanError, match="8 vision placeholders and 7 vision feature rows"):
        model.forward(wrong)


def test_no_conversations_no_answers(model: OmniModel) -> None:
    assert model.generate([]) == []


def test_refusals(model: OmniModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="role 'robot'"):
        model.generate([{"role": "robot", "content": "hi"}])
    with pytest.raises(MediaError, match=r"none\.png cannot be read"):
        model.generate([user({"type": "image", "media": tmp_path / "none.png"})])
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="COMPLETE file is missing"):
        omni_ray.load_model(tmp_path)
