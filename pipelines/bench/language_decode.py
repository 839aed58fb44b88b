"""Decoding: tokens per second of the engine over ``transformers`` LongcatFlash ``generate``, same weights, one core.

The reference decodes one stream with its own key/value cache and fastest attention.  Both sides must have produced the
same greedy ids before anything is timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.inference.engine import Engine
from omni_ray.inference.requests import GenerationRequest
from omni_ray.inference.rows import Vocabulary
from omni_ray.models import weights
from omni_ray.models.llm import LanguageModel
from omni_ray.models.tensor_files import SafetensorsFolder
from omni_ray.types.errors import OmniError
from pipelines.bench.language_configs import LARGE, SMALL
from pipelines.bench.writer import BenchReport, Figure, alternate, environment, measured

PAD, EOS, WORDS_FROM = 3, 2, 16
PROMPT_ROWS, NEW_TOKENS = 32, 128
STREAMS = 16


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Ratios at both configurations, and the engine's own gain from 16 streams at the tiny one.

    Args:
        quick: Fewer alternations.  seed: Draws other weights and prompts.
    """
    repeats = 5 if quick else 9
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = (
            *_small(repeats, seed),
            *_large(5 if quick else 7, seed),
            *_tiny(repeats, seed),
        )
    finally:
        torch.set_num_threads(threads)
    return BenchReport(
        bench="language-decode",
        environment=environment(seed=seed, threads=1, prompt_rows=PROMPT_ROWS, new_tokens=NEW_TOKENS, compiled=False),
        figures=figures,
    )


def _small(repeats: int, seed: int) -> tuple[Figure, ...]:
    rates = _rates(SMALL, (1, STREAMS), repeats, seed)
    over = "transformers generate, single stream, key/value cache, config S, fp32"
    return (
        _ratio("single_stream_speedup", rates, "ours 1", goal=3.5, against=over),
        _ratio("batch16_speedup", rates, f"ours {STREAMS}", goal=12, against=over),
        measured("transformers_tokens_per_s", rates["theirs"], unit="tokens/s", better="higher", against=over),
        measured("single_stream_tokens_per_s", rates["ours 1"], unit="tokens/s", better="higher"),
        measured("batch16_tokens_per_s", rates[f"ours {STREAMS}"], unit="tokens/s", better="higher"),
    )


def _large(repeats: int, seed: int) -> tuple[Figure, ...]:
    rates = _rates(LARGE, (1, STREAMS), repeats, seed)
    over = "transformers generate, single stream, key/value cache, config L, fp32"
    return (
        _ratio("large_batch16_speedup", rates, f"ours {STREAMS}", goal=6, against=over),
        _ratio("large_single_stream_speedup", rates, "ours 1", goal=None, against=over),
    )


def _tiny(repeats: int, seed: int) -> tuple[Figure, ...]:
    config = model_preset("tiny").language
    engine = _engine(LanguageModel(config, seed=seed))
    sides = {str(count): _ours(engine, _prompts(config, count, seed)) for count in (1, STREAMS)}
    rates = alternate(sides, repeats, warm_up=sides["1"])
    ratios = [many / one for one, many in zip(rates["1"], rates[str(STREAMS)], strict=True)]
    over = "the engine's tokens/s of one session, tiny configuration"
    return (measured("batch16_over_single", ratios, unit="ratio", better="higher", goal=6, against=over),)


def _rates(config: LanguageConfig, streams: tuple[int, ...], repeats: int, seed: int) -> dict[str, tuple[float, ...]]:
    """Tokens per second of both sides, alternating, after their ids were found equal."""
    model = LanguageModel(config, seed=seed)
    theirs, engine = _reference(model, config), _engine(model)
    prompts = _prompts(config, max(streams), seed)
    _check_equal(theirs, engine, prompts)
    best = min(("eager", "sdpa"), key=lambda kind: _seconds(theirs, prompts[0], kind))
    theirs.set_attn_implementation(best)

    def reference() -> float:
        started = time.perf_counter()
        _their_ids(theirs, prompts[0])
        return NEW_TOKENS / (time.perf_counter() - started)

    sides = {"theirs": reference}
    for count in streams:
        sides[f"ours {count}"] = _ours(engine, prompts[:count])
    return alternate(sides, repeats, warm_up=sides["ours 1"])


def _ratio(name: str, rates: dict[str, tuple[float, ...]], side: str, *, goal: float | None, against: str) -> Figure:
    ratios = [ours / theirs for ours, theirs in zip(rates[side], rates["theirs"], strict=True)]
    return measured(name, ratios, unit="ratio", better="higher", goal=goal, against=against)


def _prompts(config: LanguageConfig, count: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return list(torch.randint(WORDS_FROM, config.vocab_size, (count, PROMPT_ROWS), generator=draw))


def _engine(model: LanguageModel) -> Engine:
    # Every id counts as a word and none ends an answer, as on the other side.
    words = tuple(range(WORDS_FROM, model.config.vocab_size))
    return Engine(model, Vocabulary(eos_id=EOS, pad_id=PAD, pause_id=7, text_ids=words, code_sizes=()))


def _ours(engine: Engine, prompts: list[Tensor]) -> Callable[[], float]:
    requests = [_request(ids_T) for ids_T in prompts]

    def side() -> float:
        started = time.perf_counter()
        made = sum(len(answer.ids_R5) for answer in engine.generate(requests))
        return made / (time.perf_counter() - started)

    return side


def _request(ids_T: Tensor) -> GenerationRequest:
    ids_T5 = torch.full((len(ids_T), 5), PAD)
    ids_T5[:, 0] = ids_T
    return GenerationRequest(ids_T5=ids_T5, max_tokens=NEW_TOKENS)


def _reference(model: LanguageModel, config: LanguageConfig) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise OmniError(
            "this bench compares with transformers; install the dev extra (pip install -e .[dev])"
        ) from error
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        theirs = transformers.LongcatFlashForCausalLM._from_config(
            transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager"
        )
        # Their loader refuses released folders with zero experts, so the tensors are placed by name.
        held, source = theirs.state_dict(), SafetensorsFolder(folder)
        for part in weights.language_parts(config):
            into = held[part.name] if part.name in held else part.view(held[part.held])
            into.copy_(source[part.name])
    theirs.generation_config.eos_token_id = None
    return theirs.float().eval()


@torch.no_grad()
def _their_ids(theirs: Any, ids_T: Tensor) -> Tensor:
    ids_1T = ids_T[None]
    # Ids below 16 are masked on our side.
    out: Tensor = theirs.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=PAD,
        suppress_tokens=[i for i in range(WORDS_FROM) if i != EOS],
        eos_token_id=EOS,
    )
    return out[0, len(ids_T) :]


def _seconds(theirs: Any, ids_T: Tensor, attention: str) -> float:
    theirs.set_attn_implementation(attention)
    started = time.perf_counter()
    _their_ids(theirs, ids_T)
    return time.perf_counter() - started


def _check_equal(theirs: Any, engine: Engine, prompts: list[Tensor]) -> None:
    together = engine.generate([_request(ids_T) for ids_T in prompts])
    for ids_T, answer in zip(prompts[:2], together, strict=False):
        alone = engine.generate([_request(ids_T)])[0].ids_R5[:, 0]
        if not torch.equal(answer.ids_R5[:, 0], alone):
            raise OmniError("an answer differs between one stream and sixteen; nothing was timed")
        wanted = _their_ids(theirs, ids_T)
        if not torch.equal(alone, wanted):
            place = int((alone != wanted).nonzero()[0]) if len(alone) == len(wanted) else min(len(alone), len(wanted))
            raise OmniError(f"the sides' greedy ids differ from token {place} on; nothing was timed")
