"""Steps out of real shards under every packing; positions that hold, and those that are refused by name."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mini_world import mini_recipe, write_world

from omni_ray.config.model import model_preset
from omni_ray.models.llm import LanguageModel
from omni_ray.training.data_position import guarantees, position_record, resumed_state
from omni_ray.training.prepare import StepBuilder, tokens_by_modality
from omni_ray.types.errors import CheckpointError, DataError

RATIO: dict[str, Any] = {
    "modalities": {
        "text": {"share": 12, "blend": [{"source": "text"}]},
        "vision": {"share": 3, "blend": [{"source": "picture"}]},
        "speech": {"share": 5, "blend": [{"source": "audio", "weight": 1}, {"source": "speech", "weight": 1}]},
    }
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    (folder / "world").mkdir()
    write_world(folder / "world")
    return folder


def builder(base: Path, mixture: dict[str, Any] = RATIO, root: Path | None = None, **changes: Any) -> StepBuilder:
    stage = {
        "name": "S",
        "steps": 40,
        "mixture": mixture,
        "trainable": ["language"],
        "seq_len": 96,
        "micro_batches": 2,
        "packing": {"kind": "best_fit", "budget": 256},
    }
    top = {key: changes.pop(key) for key in ("seed", "pools", "checkpoint") if key in changes}
    return StepBuilder(mini_recipe(base, stages=[stage | changes], **top), root or base / "world")


def stream(made: StepBuilder, first: int, last: int) -> list[tuple[str, ...]]:
    return [b.samples for step in range(first, last) for b in made.build(step).plan.micro_batches]


@pytest.mark.parametrize("kind", ["best_fit", "split"])
def test_packed_steps_are_full_and_hold_whole_items(base: Path, kind: str) -> None:
    made = builder(base, packing={"kind": kind, "budget": 256})
    rows, seen = [], {"text": 0, "vision": 0, "speech": 0, "audio": 0}
    for step in range(12):
        prepared = made.build(step)
        rows += [batch.ids_T5.shape[0] for batch in prepared.batches]
        for item in prepared.plan.items:
            assert len(prepared.media[item.id]) > 0
        for name, count in tokens_by_modality(prepared).items():
            seen[name] += count
    assert max(rows) <= 256
    assert sum(rows) / (256 * len(rows)) >= 0.97
    total = sum(seen.values())
    assert seen["text"] / total == pytest.approx(0.6, abs=0.02)
    assert (seen["audio"] + seen["speech"]) / total == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("take", [{"rows": 400}, {"cost": 500.0}, {"samples": 9}], ids=str)
def test_steps_by_amount(base: Path, take: dict[str, Any]) -> None:
    made = builder(base, RATIO | {"take": take}, packing={"kind": "balance"})
    for step in range(4):
        plan = made.build(step).plan
        rows = sum(sum(batch.lengths) for batch in plan.micro_batches)
        assert len(plan.micro_batches) == 2
        assert rows <= 400 if "rows" in take else sum(len(b.samples) for b in plan.micro_batches) in range(2, 30)


def test_order_does_not_know_readers_or_ranks(base: Path) -> None:
    whole = stream(builder(base), 0, 10)
    three = [builder(base, pools={"language": {"actors": 2}, "vision": {"actors": 3}}) for _ in range(3)]
    shared = [three[step % 3].build(step) for step in range(10)]
    assert [batch.samples for prepared in shared for batch in prepared.plan.micro_batches] == whole
    backwards = builder(base)
    assert [backwards.build(step).plan.micro_batches[0].samples for step in (9, 3)] == [whole[18], whole[6]]


@pytest.mark.parametrize("kind", ["best_fit", "split"])
def test_no_attention_across_samples(base: Path, kind: str) -> None:
    """Through the model: what a sample's rows say has a gradient of exactly 0 in every other sample's rows."""
    batch = builder(base, packing={"kind": kind, "budget": 256}).build(2).batches[0]
    torch.manual_seed(0)
    model = LanguageModel(model_preset("tiny").language).eval()
    rows_TD = model.embed_rows(batch.ids_T5).detach().requires_grad_()
    hidden_TD = model(rows_TD, batch.cu_seqlens, batch.positions).hidden_TD
    assert len(batch.cu_seqlens) > 4
    for first, stop in pairwise(batch.cu_seqlens):
        (gradient_TD,) = torch.autograd.grad(hidden_TD[first:stop].square().sum(), rows_TD, retain_graph=True)
        inside = torch.zeros(len(rows_TD), dtype=torch.bool)
        inside[first:stop] = True
        assert not gradient_TD[~inside].any()
        assert gradient_TD[inside].any(dim=1).all(), "and every row of its own has one"
        with torch.no_grad():
            alone_TD = model(rows_TD[inside], (0, stop - first), batch.positions[inside]).hidden_TD
        # Not bit for bit: experts' matrix products have other row counts.
        assert torch.allclose(alone_TD, hidden_TD[inside], atol=2e-5)


def saved(made: StepBuilder, step: int) -> dict[str, Any]:
    record = position_record(made.planner.state_at(step), guarantees(made))
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["best_fit", "split", "balance"])
def test_a_saved_position_goes_on(base: Path, kind: str) -> None:
    changes: dict[str, Any] = {"packing": {"kind": kind, "budget": 256}}
    mixture = RATIO if kind != "balance" else {"text": 3, "picture": 1.5}
    whole = stream(builder(base, mixture, **changes), 0, 8)
    fresh = builder(base, mixture, **changes)
    state = resumed_state(fresh, saved(builder(base, mixture, **changes), 5))
    resumed = StepBuilder(fresh.recipe, fresh.root, state=state)
    assert stream(resumed, 5, 8) == whole[10:]
    with pytest.raises(DataError, match="step 2 lies before the data position, which is step 5"):
        resumed.build(2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 4}, "seed is 4, yet the checkpoint's order of samples was made with 0"),
    "batch": ({"micro_batches": 3}, "stages.S.sequences is 3, yet the checkpoint's order of samples was made with 2"),
    "budget": ({"packing": {"kind": "best_fit", "budget": 300}}, "stages.S.rows is 300, yet"),
    "packing": ({"packing": {"kind": "split", "budget": 256}}, "stages.S.packing is 'split', yet"),
    "mixture": ({"mixture": {"text": 1}}, "the mixture of stage S has changed since the checkpoint; restore it, or"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_longer_holds_is_refused_by_name(base: Path, what: str) -> None:
    changes, sentence = REFUSED[what]
    record = saved(builder(base), 5)
    with pytest.raises(CheckpointError) as caught:
        resumed_state(builder(base, **changes), record)
    assert sentence in str(caught.value)


def test_another_mixture_goes_on_where_it_is_accepted(base: Path) -> None:
    record = saved(builder(base), 5)
    before = stream(builder(base), 0, 5)
    other = builder(base, {"text": 1, "audio": 1})
    state = resumed_state(other, record, accept=("mixture",))
    after = stream(StepBuilder(other.recipe, other.root, state=state), 5, 8)
    texts = [name for group in before + after for name in group if name.startswith("text")]
    assert 60 > len(texts) == len(set(texts)), "one pass, nothing twice"
    pictures = {n for group in after for n in group if n.startswith("picture")}
    assert pictures, "what waited under the old mixture is still placed"


def test_changed_shards_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    shutil.copytree(base / "world", root)
    record = saved(builder(base, root=root), 5)
    assert resumed_state(builder(base, root=root), record).step == 5
    shutil.copy(root / "picture" / "train-00000.tar", root / "picture" / "train-00001.tar")
    with pytest.raises(
        CheckpointError, match="source 'picture' has changed since the checkpoint: 40 samples"
    ) as caught:
        resumed_state(builder(base, root=root), record)
    assert "restore its shards, or start in another --out" in str(caught.value)


def test_a_source_of_two_formats_is_not_taken_for_an_absent_one(base: Path, tmp_path: Path) -> None:
    """Its fallback would stand in for it without a word."""
    sources = {"text": {"path": str(tmp_path / "mixed"), "fallback": "spare"}, "spare": {"path": "{data}/text"}}
    data = {"root": str(base / "world"), "sources": sources}
    stage = {"name": "S", "steps": 4, "mixture": {"text": 2}, "trainable": ["language"], "seq_len": 96}
    recipe = mini_recipe(base, stages=[stage], data=data)
    assert set(StepBuilder(recipe, base / "world").sources) == {"spare"}, "nothing lies there"
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "train-0.jsonl").write_text('{"text": "one"}\n')
    shutil.copy(base / "world" / "text" / "train-00000.tar", tmp_path / "mixed" / "train-0.tar")
    with pytest.raises(DataError, match="mixed holds train files of jsonl and webdataset; name a format"):
        StepBuilder(recipe, base / "world")


def test_a_step_without_usable_samples_is_refused(base: Path, tmp_path: Path) -> None:
    """Headers are whole, so that rows are counted; what follows them is not."""
    root = tmp_path / "world"
    shutil.copytree(base / "world", root)
    tar = root / "audio" / "train-00000.tar"
    raw = bytearray(tar.read_bytes())
    at = raw.find(b"fLaC")
    while at >= 0:
        raw[at + 60 : at + 4000] = bytes(3940)
        at = raw.find(b"fLaC", at + 4000)
    tar.write_bytes(raw)
    with pytest.raises(DataError, match=r"step 0 has no sample that can be used; the first of \d+: audio:\d+: "):
        builder(base, {"audio": 1}, root=root).build(0)
    prepared = builder(base, {"text": 1, "audio": 1}, root=root).build(0)
    assert all(name.startswith("text") for batch in prepared.plan.micro_batches for name in batch.samples)
    assert len(prepared.bad) > 2
    again = builder(base, {"text": 1, "audio": 1}, root=root).build(0)
    assert (again.plan, again.bad) == (prepared.plan, prepared.bad), "left out the same way every time"


def test_another_tokenizer_must_fit_the_model(base: Path, tmp_path: Path) -> None:
    from omni_ray.data.tokenizer import Tokenizer

    small, large = tmp_path / "small.json", tmp_path / "large.json"
    Tokenizer.learn(["red seven"] * 3).save(small)
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (4000, 6))
    Tokenizer.learn(["".join(word) for word in letters] * 2, max_size=2000).save(large)

    def recipe(tokenizer: Path) -> Any:
        made = mini_recipe(base)
        return made.model_copy(update={"data": made.data.model_copy(update={"tokenizer": tokenizer})})

    assert len(StepBuilder(recipe(small), base / "world").tokenizer) < 300
    with pytest.raises(DataError, match=r"large.json has \d+ ids, the model 1024 text embeddings; choose another"):
        StepBuilder(recipe(large), base / "world")
