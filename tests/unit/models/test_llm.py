"""The language model: packing, embedding rule, bias controller, folders."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize(
    ("rows_", "cu", "positions", "text"),
    [
        (5, [0, 4], 5, "cu_seqlens runs from 0 to 4, yet there are 5 rows; it must be 0 and the running sums"),
        (5, [], 5, "cu_seqlens is empty, yet there are 5 rows"),
        (5, [0, 4, 3, 5], 5, "cu_seqlens falls from 4 to 3 at place 2; a length is at least 0"),
        (5, [0, 5], 4, "positions_T has shape [4], yet there are 5 rows; give one to each"),
    ],
    ids=["short", "empty", "falling", "positions"],
)
def test_impossible_packings_are_refused(
    model: LanguageModel, rows_: int, cu: list[int], positions: int, text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        model(torch.zeros(rows_, 160), cu, torch.arange(positions))


@pytest.mark.parametrize("shape", [(5, 161), (5, 2, 160)])
def test_rows_of_another_width_are_refused(model: LanguageModel, shape: tuple[int, ...]) -> None:
    text = f"has shape {list(shape)}, yet the model's hidden_size is 160"
    with pytest.raises(ValueError, match=re.escape(text)):
        model(torch.zeros(shape), [0, 5], torch.arange(5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(model: LanguageModel, bad: float) -> None:
    x = torch.zeros(5, 160)
    x[3, 7] = bad
    with pytest.raises(ValueError, match="holds values that are not finite in 1 rows, first row 3; look at the media"):
        model(x, [0, 5], torch.arange(5))


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]], ids=["no sequence", "empty sequences"])
def test_an_empty_batch_is_a_normal_batch(config: LanguageConfig, cu: list[int]) -> None:
    model = LanguageModel(config.model_copy(update={"mtp_layers": 1}))
    empty = model.embed_rows(torch.empty(0, 5, dtype=torch.int64))
    out = model(empty, cu, torch.empty(0, dtype=torch.int64))
    assert out.hidden_TD.shape == (0, 160)
    assert out.expert_counts_LE.sum() == 0
    loss = out.hidden_TD.sum() + out.balance_loss + out.z_loss
    assert float(loss.detach()) == 0.0
    loss.backward()


def test_z_loss_is_the_equation(model: LanguageModel) -> None:
    """Squared log of the sum of exp |h|, over the rows before the final norm, which are read by a hook."""
    seen: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    out = model(model.embed_rows(rows(torch.arange(20, 31))), [0, 4, 11], torch.tensor([*range(4), *range(7)]))
    hook.remove()
    want = sum(math.log(sum(math.exp(abs(float(h))) for h in row)) ** 2 for row in seen[0])
    assert float(out.z_loss.detach()) == pytest.approx(want, rel=1e-5)


def test_packing_computes_nothing_for_padding(model: LanguageModel) -> None:
    """FLOPs of a pack are those of its sequences; only attention rounds a length up to 16."""

    def flops(lengths: list[int]) -> int:
        cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(model.embed_rows(rows(torch.arange(20, 20 + cu[-1]))), cu, torch.zeros(cu[-1], dtype=torch.int64))
        return counter.get_total_flops()

    exact = flops([64])
    assert flops([16, 48]) < exact, "short beside long: nobody is padded to the longest"
    config = model.config
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    # 2 attentions a layer; scores and mixing are 2 FLOPs a value; 61 and 64 rows share one rectangle of 64.
    attention = 2 * config.num_layers * config.num_attention_heads * 2 * width * 64 * 64
    a_row = (exact - attention) / 64
    assert flops([61]) - attention < a_row * 64


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


def test_no_sequence_feels_another(config: LanguageConfig) -> None:
    """The gradient of one packed sequence's loss with respect to every other sequence's rows is nothing."""
    model, lengths = LanguageModel(config, seed=2), [5, 17, 16, 1]
    x = model.embed_rows(rows(torch.arange(20, 59))).detach().requires_grad_()
    out = model(x, [0, 5, 22, 38, 39], torch.cat([torch.arange(n) for n in lengths]), auxiliary=False)
    out.hidden_TD[5:22].square().sum().backward()
    assert x.grad is not None
    assert x.grad[5:22].abs().sum(dim=1).min() > 0
    assert not x.grad[:5].any()
    assert not x.grad[22:].any()


def test_bias_controller_holds_the_mean_number_of_ffn_experts(config: LanguageConfig) -> None:
    """A router that starts off target is steered there by its bias alone, step by step, and stays."""
    model = LanguageModel(config, seed=4)
    router = model.model.layers[0].mlp.router
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.classifier.weight[: config.n_routed_experts] *= 0.3  # FFN experts are rarely chosen at first
    means = []
    for _ in range(600):
        u = torch.randn(256, config.hidden_size, generator=generator)
        with torch.no_grad():
            chosen = router(u).expert_TK
        counts = torch.bincount(chosen.flatten(), minlength=12)
        means.append(float(counts[:8].sum()) / 256)
        model.update_expert_bias(counts.repeat(config.num_layers, 1), 2e-2)
    assert abs(means[0] - config.target_ffn_experts) > 0.4, "it starts off target"
    late = means[-100:]
    assert sum(late) / 100 == pytest.approx(config.target_ffn_experts, abs=0.05)
    assert max(abs(m - config.target_ffn_experts) for m in late) < 0.3
