"""Batched generation: equal to the plain forward, blind to its neighbours, obeying the row rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import model_preset
from omni_ray.inference.engine import Engine
from omni_ray.inference.requests import Generation, GenerationRequest, MadeRow
from omni_ray.inference.rows import Vocabulary
from omni_ray.models.llm import LanguageModel
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, AUDIO_RESERVED
from omni_ray.types.errors import RequestError

EOS, PAD, PAUSE = 2, 3, 7


@pytest.fixture(scope="module")
def engine(form: str) -> Engine:
    model = LanguageModel(model_preset("tiny").language, seed=3)
    with torch.no_grad():
        # Ends that do come, now and then.
        model.get_parameter("lm_head.weight")[[EOS, PAUSE]] *= 5.0
        model.get_parameter("audio_heads.0.weight")[AUDIO_EOS] *= 5.0
    words = tuple(range(16, 1000))
    return Engine(
        model, Vocabulary(eos_id=EOS, pad_id=PAD, pause_id=PAUSE, text_ids=words, code_sizes=(64, 100, 100, 100))
    )


def prompt(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids_T5 = torch.full((length, 5), PAD)
    ids_T5[:, 0] = torch.randint(16, 1000, (length,), generator=generator)
    if length > 12:
        ids_T5[4:9] = torch.tensor([PAD, 40, 41, 42, 43])
    return ids_T5


def mixed_requests() -> list[GenerationRequest]:
    requests = []
    for i, length in enumerate([5, 17, 40, 40, 70, 3, 64, 90]):
        features = ((1, torch.randn(3, 160, generator=torch.Generator().manual_seed(i))),) if length > 16 else ()
        requests.append(
            GenerationRequest(
                ids_T5=prompt(length, i),
                features=features,
                voice=i % 2 == 1,
                max_tokens=6 + 2 * i,
                temperature=0.0 if i % 3 else 1.0,
                seed=i,
            )
        )
    return requests


@pytest.fixture(scope="module")
def together(engine: Engine) -> list[Generation]:
    return engine.generate(mixed_requests())


@pytest.mark.parametrize("index", range(8))
def test_answer_does_not_depend_on_who_shares_the_batch(engine: Engine, together: list[Generation], index: int) -> None:
    (alone,) = engine.generate([mixed_requests()[index]])
    assert torch.equal(alone.ids_R5, together[index].ids_R5)
    assert alone.finished == together[index].finished


def test_hidden_states_are_the_same_bits_alone_and_together(engine: Engine) -> None:
    requests = mixed_requests()
    sessions, hidden_BH = engine.prefill(requests)
    for index, request in enumerate(requests):
        (session,), hidden_1H = engine.prefill([request])
        assert torch.equal(hidden_1H[0], hidden_BH[index])
        engine.close(session)
    for session in sessions:
        engine.close(session)


def test_cached_decoding_equals_the_plain_forward(engine: Engine) -> None:
    request = GenerationRequest(ids_T5=prompt(37, 9), max_tokens=30)
    model, session = engine.model, engine.open()
    engine.feed(session, request.ids_T5)
    engine.answer(session, request)
    made: list[MadeRow] = []
    while not made or not made[-1].last:
        made += engine.step([session]).values()
    rows = torch.stack([row.ids_5 for row in made])
    (answer,) = engine.generate([request])
    assert torch.equal(answer.ids_R5, rows)
    assert engine.length(session) == 37 + len(rows) - 1
    whole = torch.cat([request.ids_T5, rows])
    hidden = model(model.embed_rows(whole), [0, len(whole)], torch.arange(len(whole))).hidden_TD
    for step, row in enumerate(made):
        torch.testing.assert_close(row.hidden_H, hidden[36 + step], rtol=1e-4, atol=1e-4)
    engine.close(session)


def test_features_are_what_the_model_reads(engine: Engine) -> None:
    plain = GenerationRequest(ids_T5=prompt(20, 1), max_tokens=1)
    shown = GenerationRequest(ids_T5=prompt(20, 1), max_tokens=1, features=((2, torch.ones(4, 160)),))
    sessions, hidden_BH = engine.prefill([plain, shown])
    assert not torch.equal(hidden_BH[0], hidden_BH[1])
    for session in sessions:
        engine.close(session)


def test_text_answers_hold_words_and_stop_at_the_end(engine: Engine) -> None:
    requests = [GenerationRequest(ids_T5=prompt(9, i), max_tokens=40, temperature=1.0, seed=i) for i in range(12)]
    answers = engine.generate(requests)
    assert any(answer.finished for answer in answers)
    for answer in answers:
        text, codes = answer.ids_R5[:, 0], answer.ids_R5[:, 1:]
        assert (codes == AUDIO_PAD).all()
        assert (text[:-1] >= 16).all()
        assert answer.finished == (int(text[-1]) == EOS)
        assert answer.finished or len(text) == 40


def test_voice_answers_keep_the_rules_of_parallel_rows(engine: Engine) -> None:
    requests = [
        GenerationRequest(ids_T5=prompt(9, i), voice=True, max_tokens=40, temperature=1.0, seed=i) for i in range(12)
    ]
    answers = engine.generate(requests)
    assert any(answer.finished for answer in answers)
    for answer in answers:
        check_voice_rows(answer)


def check_voice_rows(answer: Generation) -> None:
    rows = answer.ids_R5.tolist()
    start = 0
    while start < len(rows):
        semantic = [row[1] for row in rows[start:]]
        count = semantic.index(AUDIO_EOS) if AUDIO_EOS in semantic else None
        segment = rows[start : start + count + 1] if count is not None else rows[start:]
        assert segment[0][2:] == [AUDIO_PAD] * 3
        assert all(AUDIO_RESERVED <= code < 132 for row in segment[1:] for code in row[2:])
        assert all(AUDIO_RESERVED <= row[1] < 96 for row in segment[: count if count is not None else None])
        text = [row[0] for row in segment]
        ends = [i for i, token in enumerate(text) if token in (EOS, PAUSE, PAD)]
        if count is None:
            assert not answer.finished
            return
        assert count >= 1
        assert all(token == PAD for token in text[ends[0] + 1 :])
        start += len(segment)
        assert (start == len(rows)) == (text[ends[0]] != PAUSE) or not answer.finished
    assert answer.finished


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (GenerationRequest(ids_T5=torch.zeros(0, 5, dtype=torch.int64)), "a prompt has no rows"),
        (GenerationRequest(ids_T5=prompt(9, 0), max_tokens=5000), "max_tokens is 5000 after a prompt of 9 rows"),
        (GenerationRequest(ids_T5=prompt(9, 0), features=((7, torch.ones(4, 160)),)), r"features of shape \[4, 160\]"),
    ],
    ids=["empty", "too long", "features outside"],
)
def test_refusals(engine: Engine, request_: GenerationRequest, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        engine.generate([request_])
