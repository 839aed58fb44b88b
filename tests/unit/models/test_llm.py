"""The language model: packing, embedding rule, bias controller, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.models.llm import LanguageModel

PAD = 3


@pytest.fixture(scope="module")
def config() -> LanguageConfig:
    return model_preset("tiny").language


@pytest.fixture(scope="module")
def model(config: LanguageConfig) -> LanguageModel:
    return LanguageModel(config, seed=5)


def rows(text: Tensor, codes: Tensor | None = None) -> Tensor:
    ids_T5 = torch.full((len(text), 5), PAD)
    ids_T5[:, 0] = text
    if codes is not None:
        ids_T5[:, 1:] = codes
    return ids_T5


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(config: LanguageConfig) -> None:
    first, torch_state = LanguageModel(config, seed=5), torch.rand(3)
    second, third = LanguageModel(config, seed=5), LanguageModel(config, seed=6)
    del torch_state
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name


@pytest.mark.parametrize("lengths", [[7], [20, 20], [1, 33, 16, 17], [5, 0, 3]], ids=str)
def test_a_sequence_is_the_same_alone_and_packed(model: LanguageModel, lengths: list[int]) -> None:
    torch.manual_seed(0)
    texts = [torch.randint(20, 1000, (n,)) for n in lengths]
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = model(model.embed_rows(rows(torch.cat(texts))), cu, positions).hidden_TD
    for text, start, end in zip(texts, cu, cu[1:], strict=False):
        if len(text):
            alone = model(model.embed_rows(rows(text)), [0, len(text)], torch.arange(len(text))).hidden_TD
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)


def test_logits_equal_the_packed_forward_and_do_not_see_the_future(model: LanguageModel) -> None:
    torch.manual_seed(0)
    ids_BT = torch.randint(20, 1000, (3, 12))
    logits = model.logits(ids_BT)
    assert logits.shape == (3, 12, 1024)
    changed = ids_BT.clone()
    changed[:, 8:] += 1
    torch.testing.assert_close(model.logits(changed)[:, :8], logits[:, :8], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.logits(changed)[:, 8:], logits[:, 8:], atol=1e-2)


def test_embedding_rule(model: LanguageModel) -> None:
    text, codes = model.model.embed_tokens.weight, [t.weight for t in model.audio_embeddings]
    ids = torch.tensor(
        [[40, PAD, PAD, PAD, PAD], [PAD, 33, PAD, PAD, PAD], [PAD, PAD, 34, 35, 36], [41, 2, 37, 38, 39]]
    )
    got = model.embed_rows(ids)
    torch.testing.assert_close(got[0], text[40])
    torch.testing.assert_close(got[1], codes[0][33])
    torch.testing.assert_close(got[2], codes[1][34] + codes[2][35] + codes[3][36])
    torch.testing.assert_close(got[3], text[41] + codes[0][2] + codes[1][37] + codes[2][38] + codes[3][39])
    only_pad = model.embed_rows(torch.full((1, 5), PAD))
    torch.testing.assert_close(only_pad[0], text[PAD])


def test_forward_and_backward_give_the_same_bits_twice(config: LanguageConfig) -> None:
    def gradients() -> list[Tensor]:
        model = LanguageModel(config, seed=1)
        ids = rows(torch.arange(20, 83), torch.randint(32, 132, (63, 4), generator=torch.Generator().manual_seed(1)))
        out = model(model.embed_rows(ids), [0, 30, 63], torch.cat([torch.arange(30), torch.arange(33)]))
        loss = model.text_logits(out.hidden_TD).logsumexp(-1).sum() + out.balance_loss + out.z_loss
        for codebook in range(4):
            loss = loss + model.audio_logits(out.hidden_TD, codebook).square().sum()
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    first, second = gradients(), gradients()
    assert len(first) == len(list(LanguageModel(config).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bias_controller_moves_ffn_experts_towards_the_target(config: LanguageConfig) -> None:
    model = LanguageModel(config)
    counts = torch.zeros(2, 12, dtype=torch.int64)
    counts[:, 0], counts[:, 8] = 90, 210
    model.update_expert_bias(counts, 1e-3)
    bias = model.model.layers[1].mlp.router.e_score_correction_bias
    want = 2.0 / (3 * 8)
    torch.testing.assert_close(bias[0], torch.tensor(1e-3 * (want - 0.3)))
    torch.testing.assert_close(bias[1], torch.tensor(1e-3 * want))
    assert torch.equal(bias[8:], torch.zeros(4))


def test_wrong_cu_seqlens_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 4, yet there are 5 rows"):
        model(torch.zeros(5, 160), [0, 4], torch.arange(5))


@pytest.mark.parametrize("shard", [10**9, 300_000], ids=["one file", "sharded"])
def test_save_and_load_keep_every_bit(model: LanguageModel, tmp_path: Path, shard: int) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.router.e_score_correction_bias.copy_(torch.arange(12) * 0.1)
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard < 10**9)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_last_rope_base_is_saved_and_used(config: LanguageConfig, tmp_path: Path) -> None:
    model = LanguageModel(config)
    rows_TD, positions = model.embed_rows(rows(torch.arange(20, 50))), torch.arange(30)
    changed = model(rows_TD, [0, 30], positions, rope_base=50.0).hidden_TD
    model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.config.rope_theta == 50.0
    assert torch.equal(loaded(rows_TD, [0, 30], positions).hidden_TD, changed)
    assert not torch.allclose(LanguageModel(config)(rows_TD, [0, 30], positions).hidden_TD, changed, atol=1e-3)
