"""The compiled forward: the numbers of torch's operations, the same bits in any company and cut, and doing without."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.inference.cache import PAGE_ROWS, LatentCache
from omni_ray.inference.native import forward
from omni_ray.inference.native.forward import NativeForward, forward_of
from omni_ray.inference.row_forward import RowForward
from omni_ray.inference.row_weights import row_weights
from omni_ray.models.llm import LanguageModel
from omni_ray.models.native import library

TINY = model_preset("tiny").language
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "three heads, wide experts": {"num_attention_heads": 3, "expert_ffn_hidden_size": 96, "moe_topk": 5},
    "odd widths": {"hidden_size": 132, "q_lora_rank": 50, "qk_nope_head_dim": 10, "v_head_dim": 22, "kv_lora_rank": 80},
    "more heads than lanes": {"num_attention_heads": 20, "qk_rope_head_dim": 6, "kv_lora_rank": 16},
    "one layer, one expert a token": {"num_layers": 1, "moe_topk": 1, "zero_expert_num": 1, "target_ffn_experts": 0.9},
}

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C compiler")


def config_of(**changes: Any) -> LanguageConfig:
    return LanguageConfig.model_validate(TINY.model_dump() | changes)


def native(model: LanguageModel, cache: LatentCache) -> NativeForward:
    made = forward_of(model, cache)
    assert isinstance(made, NativeForward)
    return made


def untrained(config: LanguageConfig, seed: int = 0) -> LanguageModel:
    """Gains and biases other than those of a fresh model, so that a lost one shows."""
    model = LanguageModel(config, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                values.mul_(1 + 0.3 * torch.rand(values.shape, generator=draw))
            elif "correction_bias" in name:
                values.copy_(0.05 * torch.randn(values.shape, generator=draw))
            elif values.dim() > 1:
                values.mul_(2.0)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_torchs_operations(shape: str) -> None:
    config = config_of(**SHAPES[shape])
    model = untrained(config)
    draw = torch.Generator().manual_seed(1)
    caches = LatentCache(config), LatentCache(config)
    forms = native(model, caches[0]), RowForward(row_weights(model), model.rope_base, caches[1])
    sequences = [cache.open() for cache in caches for _ in range(3)]
    for counts in [(5, 70, 1), (1, 1, 1), (1, 9, 140), (1, 1, 1), (3, 1, 2)]:
        x_TH = torch.randn(sum(counts), config.hidden_size, generator=draw)
        given = x_TH.clone()
        ours, theirs = (
            form.advance(x_TH, list(zip(sequences[3 * place : 3 * place + 3], counts, strict=True)))
            for place, form in enumerate(forms)
        )
        assert torch.equal(x_TH, given), "what the caller gave is its own"
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def rows_alone(form: NativeForward, x_TH: Tensor, cuts: list[int]) -> Tensor:
    """Last state of every cut of one sequence."""
    sequence = form.cache.open()
    return torch.cat([form.advance(part, [(sequence, len(part))]) for part in x_TH.split(cuts)])


def test_bits_depend_on_neither_cut_nor_company_nor_place() -> None:
    model = untrained(TINY, seed=4)
    form = native(model, LatentCache(TINY))
    x_TH = torch.randn(200, TINY.hidden_size, generator=torch.Generator().manual_seed(2))
    row_by_row = rows_alone(form, x_TH, [1] * 200)
    for cuts in ([200], [1, 199], [63, 1, 65, 71], [100, 7, 93]):
        ends = torch.tensor(cuts).cumsum(0) - 1
        assert torch.equal(rows_alone(form, x_TH, cuts), row_by_row[ends])
    for company in (1, 2, 5, 6, 7, 12, 31):
        others = [form.cache.open() for _ in range(company)]
        mine = form.cache.open()
        for row in range(0, 200, 40):
            spans = [(other, 1 + number % 3) for number, other in enumerate(others)]
            rest = torch.randn(sum(count for _, count in spans), TINY.hidden_size)
            middle = len(spans) // 2
            before = sum(count for _, count in spans[:middle])
            together = torch.cat([rest[:before], x_TH[row : row + 40], rest[before:]])
            last = form.advance(together, [*spans[:middle], (mine, 40), *spans[middle:]])
            assert torch.equal(last[middle], row_by_row[row + 39])
        for sequence in (*others, mine):
            form.cache.close(sequence)


def test_scattered_pages_give_the_same_bits() -> None:
    form = native(untrained(TINY), LatentCache(TINY))
    x_TH = torch.randn(3 * PAGE_ROWS, TINY.hidden_size, generator=torch.Generator().manual_seed(3))
    wanted = rows_alone(form, x_TH, [PAGE_ROWS] * 3)
    first, second = form.cache.open(), form.cache.open()
    for sequence in (first, second):
        form.advance(x_TH[:PAGE_ROWS], [(sequence, PAGE_ROWS)])
    form.cache.fork(first)  # a shared page is not moved, and the one behind it is taken
    found = [form.advance(part, [(first, PAGE_ROWS)]) for part in x_TH[PAGE_ROWS:].split(PAGE_ROWS)]
    pages = form.cache.pages(first)
    assert any(page + 1 != after for page, after in pairwise(pages)), "the pages do not follow"
    assert torch.equal(torch.cat(found), wanted[1:])


def test_other_weights_threads_and_types_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LatentCache(TINY)
    assert isinstance(forward_of(LanguageModel(config_of(kv_lora_rank=44)), cache), RowForward), "no whole vectors"
    half = LanguageModel(TINY).to(torch.bfloat16)
    assert isinstance(forward_of(half, LatentCache(TINY, dtype=torch.bfloat16)), RowForward)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert isinstance(forward_of(LanguageModel(TINY), cache), RowForward), "torch's products use both cores"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """As a process that has compiled nothing yet, with a cache of its own."""
    monkeypatch.setenv("OMNI_RAY_CACHE", str(tmp_path))
    library.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.library.cache_clear()


def test_compiled_once_and_kept(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert library.library() is not None
    (made,) = (tmp_path / "native").iterdir()
    assert made.suffix == ".so"
    library.library.cache_clear()

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("compiled again")

    unloaded.setattr(library.subprocess, "run", refused)
    assert library.library() is not None


@pytest.mark.parametrize("trouble", ["switched off", "no compiler", "a compiler that fails"])
def test_does_without(
    unloaded: pytest.MonkeyPatch, tmp_path: Path, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if trouble == "switched off":
        unloaded.setenv(library.SWITCH, "0")
    elif trouble == "no compiler":
        unloaded.delenv("CC", raising=False)
        unloaded.setenv("PATH", str(tmp_path))
    else:
        unloaded.setenv("CC", "false")
    assert library.library() is None
    assert library.library() is None
    told = capsys.readouterr().err.count("native_unavailable")
    assert told == (0 if trouble == "switched off" else 1), "told once, and not where it was asked for"
    assert isinstance(forward.forward_of(LanguageModel(TINY), LatentCache(TINY)), RowForward)
