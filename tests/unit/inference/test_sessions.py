"""Sessions of the engine: pieces equal the whole; rollback, forks, shared prefixes, limits; no page is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import model_preset
from omni_ray.inference.engine import Engine
from omni_ray.inference.requests import AnswerOptions, Generation, GenerationRequest
from omni_ray.inference.rows import Vocabulary
from omni_ray.models.llm import LanguageModel
from omni_ray.types.errors import RequestError, ResourceError

PAD = 3
VOCABULARY = Vocabulary(
    eos_id=2, pad_id=PAD, pause_id=7, text_ids=tuple(range(16, 1000)), code_sizes=(64, 100, 100, 100)
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(model_preset("tiny").language, seed=5)


@pytest.fixture
def engine(model: LanguageModel, form: str) -> Engine:
    return Engine(model, VOCABULARY)


def prompt(length: int, seed: int) -> Tensor:
    ids_T5 = torch.full((length, 5), PAD)
    ids_T5[:, 0] = torch.randint(16, 1000, (length,), generator=torch.Generator().manual_seed(seed))
    return ids_T5


def finish(engine: Engine, session: int) -> Tensor:
    rows = []
    while True:
        for made in engine.step([session]).values():
            rows.append(made.ids_5)
            if made.last:
                return torch.stack(rows)


def answer_of(engine: Engine, ids_T5: Tensor, options: AnswerOptions) -> Tensor:
    (answer,) = engine.generate(
        [
            GenerationRequest(
                ids_T5=ids_T5, voice=options.voice, max_tokens=options.max_tokens, temperature=options.temperature
            )
        ]
    )
    return answer.ids_R5


@pytest.mark.parametrize("pieces", [[300], [1] * 300, [7, 1, 64, 100, 2, 126], [128, 129, 43]], ids=len)
def test_a_prompt_in_pieces_gives_the_bits_of_the_whole(engine: Engine, pieces: Sequence[int]) -> None:
    ids_T5 = prompt(300, 1)
    (whole,), whole_1H = engine.prefill([GenerationRequest(ids_T5=ids_T5)])
    session = engine.open()
    for piece in ids_T5.split(list(pieces)):
        engine.feed(session, piece)
        engine.step([session])
    assert torch.equal(engine.hidden(session), whole_1H[0])
    for slot in range(engine.cache.slots):
        fed, at_once = (engine.cache.keys(slot, name, 300).turned_XL[:, :300] for name in (session, whole))
        assert torch.equal(fed, at_once)


def test_decoded_rows_and_prompt_pieces_share_forwards_without_touching_each_other(engine: Engine) -> None:
    options = AnswerOptions(max_tokens=12, voice=True)
    want = [answer_of(engine, prompt(9, 20 + i), options) for i in range(3)]
    sessions = [engine.open() for _ in range(3)]
    rows: dict[int, list[Tensor]] = {session: [] for session in sessions}
    for i, session in enumerate(sessions):
        engine.feed(session, prompt(9, 20 + i))
        engine.answer(session, options)
        for number, made in engine.step().items():
            rows[number].append(made.ids_5)
    late = engine.open()
    engine.feed(late, prompt(700, 9))
    for _ in range(20):
        for number, made in engine.step().items():
            rows[number].append(made.ids_5)
    for session, answer in zip(sessions, want, strict=True):
        assert torch.equal(torch.stack(rows[session]), answer)
    assert torch.equal(engine.hidden(late), engine.prefill([GenerationRequest(ids_T5=prompt(700, 9))])[1][0])


@pytest.mark.parametrize("kept", [1, 63, 64, 65, 100], ids="back to {}".format)
def test_after_a_rollback_everything_is_as_if_it_never_had_speculated(engine: Engine, kept: int) -> None:
    options = AnswerOptions(max_tokens=10, temperature=1.0, seed=4)
    first, more = prompt(kept, 2), prompt(40, 3)
    quiet = engine.open()
    engine.feed(quiet, first)
    engine.feed(quiet, more)
    engine.answer(quiet, options)
    want, pages = finish(engine, quiet), len(engine.cache.pages(quiet))
    session = engine.open()
    engine.feed(session, first)
    engine.answer(session, AnswerOptions(max_tokens=90))
    for _ in range(80):
        engine.step([session])
    engine.crop(session, kept)
    assert engine.length(session) == kept
    engine.feed(session, more)
    engine.answer(session, options)
    assert torch.equal(finish(engine, session), want)
    assert len(engine.cache.pages(session)) == pages


def test_a_second_turn_goes_on_where_the_first_ended(engine: Engine) -> None:
    options = AnswerOptions(max_tokens=8)
    session = engine.open()
    engine.feed(session, prompt(30, 1))
    engine.answer(session, options)
    said = finish(engine, session)
    # The last row was chosen and not run: the next turn begins with it.
    assert engine.length(session) == 30 + len(said) - 1
    engine.feed(session, torch.cat([said[-1:], prompt(11, 2)]))
    engine.answer(session, options)
    whole = torch.cat([prompt(30, 1), said, prompt(11, 2)])
    assert torch.equal(finish(engine, session), answer_of(engine, whole, options))


def test_forks_answer_by_themselves_over_shared_pages(engine: Engine) -> None:
    session = engine.open()
    engine.feed(session, prompt(130, 1))
    engine.step()
    held = engine.cache.pages_held
    forks = [engine.fork(session) for _ in range(4)]
    assert engine.cache.pages_held == held
    for seed, fork in enumerate(forks):
        engine.answer(fork, AnswerOptions(max_tokens=6, temperature=1.0, seed=seed))
    answers = [finish(engine, fork) for fork in forks]
    for seed, answer in enumerate(answers):
        request = GenerationRequest(ids_T5=prompt(130, 1), max_tokens=6, temperature=1.0, seed=seed)
        assert torch.equal(engine.generate([request])[0].ids_R5, answer)
    for fork in forks:
        engine.close(fork)
    assert engine.cache.pages_held == held


def test_shared_prefixes_are_found_by_content_and_change_no_bit(model: LanguageModel) -> None:
    engine = Engine(model, VOCABULARY, prefix_pages=8)
    common, features = prompt(200, 1), [(5, torch.randn(3, 160, generator=torch.Generator().manual_seed(0)))]
    other = [(5, features[0][1] + 1.0)]
    hidden = []
    for shown, tail, tenant in [(features, 2, ""), (features, 3, ""), (other, 3, ""), (features, 3, "someone else")]:
        session = engine.open(tenant)
        engine.feed(session, torch.cat([common, prompt(20, tail)]), shown)
        engine.step()
        hidden.append(engine.hidden(session))
        engine.close(session)
    assert engine.prefixes.rows_reused == 192
    plain = Engine(model, VOCABULARY)
    request = GenerationRequest(ids_T5=torch.cat([common, prompt(20, 3)]), features=tuple(features))
    assert torch.equal(plain.prefill([request])[1][0], hidden[1])
    assert torch.equal(hidden[1], hidden[3])
    assert not torch.equal(hidden[1], hidden[2])
    assert len(engine.prefixes) <= 8
    engine.prefixes.clear()
    assert engine.cache.pages_held == 0


def test_new_weights_are_followed_and_old_prefixes_forgotten() -> None:
    changing = LanguageModel(model_preset("tiny").language, seed=5)
    engine = Engine(changing, VOCABULARY, prefix_pages=4)
    request = GenerationRequest(ids_T5=prompt(130, 1), max_tokens=5)
    engine.generate([request])
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(1.1)
    again = engine.generate([request])[0].ids_R5
    assert torch.equal(again, Engine(changing, VOCABULARY).generate([request])[0].ids_R5)


def test_cancelling_frees_and_others_go_on(engine: Engine) -> None:
    options = AnswerOptions(max_tokens=15, temperature=1.0, seed=1)
    kept, dropped = engine.open(), engine.open()
    for session in (kept, dropped):
        engine.feed(session, prompt(20, session))
        engine.answer(session, options)
    rows = []
    for turn in range(17):
        if turn == 5:
            engine.close(dropped)
        rows += [made.ids_5 for number, made in engine.step().items() if number == kept]
    request = GenerationRequest(ids_T5=prompt(20, kept), max_tokens=15, temperature=1.0, seed=1)
    assert torch.equal(torch.stack(rows), engine.generate([request])[0].ids_R5)
    engine.close(kept)
    assert engine.cache.pages_held == 0


def test_a_longer_limit_continues_the_same_draws(engine: Engine) -> None:
    def drawn(limit: int) -> Generation:
        return engine.generate(
            [GenerationRequest(ids_T5=prompt(20, 1), max_tokens=limit, temperature=1.0, seed=3, voice=True)]
        )[0]

    short, long = drawn(5).ids_R5, drawn(12).ids_R5
    assert torch.equal(long[: len(short)], short)


def test_limits_are_refused_before_anything_runs(model: LanguageModel) -> None:
    engine = Engine(model, VOCABULARY, max_pages=6)
    session = engine.open()
    engine.feed(session, prompt(130, 1))
    with pytest.raises(ResourceError, match=r"300 more rows would take the latent cache to 8 pages of 64 rows.* 6;"):
        engine.answer(session, AnswerOptions(max_tokens=300))
    other = engine.open()
    with pytest.raises(ResourceError, match="130 more rows would take the latent cache to 8 pages"):
        engine.feed(other, prompt(130, 2))
    engine.close(session)
    engine.feed(other, prompt(130, 2))
    engine.step()
    assert engine.length(other) == 130


def test_refusals_name_what_is_wrong(engine: Engine) -> None:
    session = engine.open()
    with pytest.raises(RequestError, match="no fed piece ends at row 0"):
        engine.answer(session, AnswerOptions())
    with pytest.raises(RequestError, match="features at row 1 hold values that are not finite"):
        engine.feed(session, prompt(9, 1), [(1, torch.full((2, 160), float("nan")))])
    with pytest.raises(RequestError, match=r"ids of column 0 run from .* yet its table has 1024"):
        engine.feed(session, torch.full((2, 5), 5000))
    engine.feed(session, prompt(9, 1))
    engine.answer(session, AnswerOptions(max_tokens=3))
    with pytest.raises(RequestError, match="is answering; cancel the answer"):
        engine.feed(session, prompt(9, 1))
    with pytest.raises(RequestError, match="is answering already"):
        engine.answer(session, AnswerOptions(max_tokens=3))
    engine.crop(session, 0)
    with pytest.raises(ValueError, match="cannot crop"):
        engine.crop(session, 5)


def test_bf16_answers_through_the_same_path() -> None:
    half = LanguageModel(model_preset("tiny").language, seed=5).to(torch.bfloat16)
    engine = Engine(half, VOCABULARY)
    requests = [GenerationRequest(ids_T5=prompt(40 + i, i), max_tokens=1) for i in range(3)]
    sessions, hidden_BH = engine.prefill(requests)
    for request, hidden_H in zip(requests, hidden_BH, strict=True):
        ids_T5 = request.ids_T5
        want = half(half.embed_rows(ids_T5), [0, len(ids_T5)], torch.arange(len(ids_T5))).hidden_TD[-1]
        torch.testing.assert_close(hidden_H, want, rtol=0.1, atol=0.1)
    assert len(sessions) == 3


@pytest.mark.gpu
def test_cuda_agrees_with_cpu(model: LanguageModel) -> None:
    requests = [GenerationRequest(ids_T5=prompt(40 + 30 * i, i), max_tokens=8) for i in range(4)]
    on_cpu = Engine(model, VOCABULARY).prefill(requests)[1]
    moved = LanguageModel(model.config, seed=5).to("cuda")
    engine = Engine(moved, VOCABULARY)
    together = engine.prefill(requests)[1]
    torch.testing.assert_close(together.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    alone = torch.cat([engine.prefill([request])[1] for request in requests])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
