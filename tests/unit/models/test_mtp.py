"""The multi-token-prediction head against its equations, written out row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.curriculum import LossWeights
from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.models import weights
from omni_ray.models.llm import LanguageModel
from omni_ray.models.mtp import next_rows
from omni_ray.models.packed_attention import packed_layout
from omni_ray.models.rope import Turn, rope_tables
from omni_ray.training.loss import ahead_objective, term_scales
from omni_ray.types.batch import IGNORE, LossKind, OmniBatch

CONFIG = model_preset("tiny").language.model_copy(update={"mtp_layers": 1})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = LanguageModel(CONFIG, seed=3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1)
    return made


def slow_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean() + eps).sqrt()


def rotate(x: Tensor, t: int) -> Tensor:
    """Pairs (2i, 2i+1) of one head at position t."""
    angle = t * CONFIG.rope_theta ** (-torch.arange(0, len(x), 2) / len(x))
    turned = torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten()


def slow_ahead(
    model: LanguageModel, hidden_TH: Tensor, embeddings_TH: Tensor, published: dict[str, Tensor] | None = None
) -> Tensor:
    """One sequence; attention head by head, query by query, from the published tensors."""
    p = {n.removeprefix("model.mtp."): t for n, t in (published or weights.published_tensors(model, CONFIG)).items()}
    eps, at, rows = CONFIG.rms_norm_eps, "layers.0.", len(hidden_TH)
    n, r, e, rank = CONFIG.qk_nope_head_dim, CONFIG.qk_rope_head_dim, CONFIG.v_head_dim, CONFIG.kv_lora_rank
    z = []
    for t in range(rows):
        following = embeddings_TH[min(t + 1, rows - 1)]
        both = [
            slow_norm(following, p[f"{at}enorm.m.weight"], eps),
            slow_norm(hidden_TH[t], p[f"{at}hnorm.m.weight"], eps),
        ]
        z.append(p[f"{at}eh_proj.weight"] @ torch.cat(both))

    w = {name.removeprefix(f"{at}self_attn."): t for name, t in p.items() if "self_attn" in name}
    queries, keys, values = [], [], []
    for t in range(rows):
        x = slow_norm(z[t], p[f"{at}input_layernorm.weight"], eps)
        q_a = slow_norm(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"], 1e-6)
        q = (w["q_b_proj.weight"] @ q_a * (CONFIG.hidden_size / CONFIG.q_lora_rank) ** 0.5).view(-1, n + r)
        latent, k_rope = (w["kv_a_proj_with_mqa.weight"] @ x).split([rank, r])
        latent = slow_norm(latent, w["kv_a_layernorm.weight"], 1e-6) * (CONFIG.hidden_size / rank) ** 0.5
        kv = (w["kv_b_proj.weight"] @ latent).view(-1, n + e)
        queries.append([torch.cat([head[:n], rotate(head[n:], t)]) for head in q])
        keys.append([torch.cat([head[:n], rotate(k_rope, t)]) for head in kv])
        values.append([head[n:] for head in kv])
    out = []
    for t in range(rows):
        heads = []
        for h in range(CONFIG.num_attention_heads):
            scores = torch.stack([queries[t][h] @ keys[s][h] for s in range(t + 1)]) / (n + r) ** 0.5
            heads.append(sum(a * values[s][h] for s, a in enumerate(scores.softmax(0))))
        y = z[t] + w["o_proj.weight"] @ torch.cat(heads)
        x = slow_norm(y, p[f"{at}post_attention_layernorm.weight"], eps)
        mlp = {kind: p[f"{at}transformer_layer.mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        y = y + mlp["down"] @ (F.silu(mlp["gate"] @ x) * (mlp["up"] @ x))
        out.append(slow_norm(y, p["norm.weight"], eps))
    return torch.stack(out)


def batch_of(lengths: list[int]) -> OmniBatch:
    rows = sum(lengths)
    ids = torch.randint(20, 1000, (rows, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 1:] = torch.where(torch.arange(rows)[:, None] % 3 == 0, ids[:, 1:] % 100 + 32, 3)
    labels = torch.full((rows, 5), IGNORE)
    labels[:, 0] = torch.randint(20, 1000, (rows,), generator=torch.Generator().manual_seed(1))
    kinds = torch.tensor([int(LossKind.TEXT), int(LossKind.NONE), int(LossKind.AUDIO_TEXT)]).repeat(rows)[:rows]
    cu = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return OmniBatch(ids_T5=ids, cu_seqlens=cu, labels_T5=labels, loss_kind_T=kinds, positions=positions)


def test_head_equals_the_slow_transcription(model: LanguageModel) -> None:
    lengths = [6, 1, 9]
    batch = batch_of(lengths)
    with torch.no_grad():
        rows = model.embed_rows(batch.ids_T5)
        out = model(rows, batch.cu_seqlens, batch.positions)
        assert out.ahead_TD is not None
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            want = slow_ahead(model, out.hidden_TD[part], rows[part])
            torch.testing.assert_close(out.ahead_TD[part], want, rtol=1e-4, atol=1e-4)
            start += n


def test_gradients_equal_the_slow_transcription(model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(7, CONFIG.hidden_size, generator=generator) for _ in range(2)]
    rows, hidden = (x.clone().requires_grad_() for x in made)
    turn = Turn(*rope_tables(torch.arange(7), CONFIG.qk_rope_head_dim, CONFIG.rope_theta))
    layout = packed_layout((0, 7), CONFIG.num_attention_heads, turn)
    model.zero_grad()
    assert model.model.mtp is not None
    model.model.mtp(hidden, rows, (0, 7), layout).sin().sum().backward()
    ours = {n: g for n, g in weights.published_gradients(model, CONFIG).items() if n.startswith("model.mtp.")}

    published = {name: t.detach().clone() for name, t in weights.published_tensors(model, CONFIG).items()}
    leaves = {name: published[name].requires_grad_() for name in ours}
    slow_rows, slow_hidden = (x.clone().requires_grad_() for x in made)
    slow_ahead(model, slow_hidden, slow_rows, published).sin().sum().backward()
    assert len(ours) == 16
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(rows.grad, slow_rows.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(hidden.grad, slow_hidden.grad, rtol=1e-3, atol=1e-4)
    model.zero_grad()


def test_loss_is_the_next_rows_label_times_its_terms_factor(model: LanguageModel) -> None:
    batch = batch_of([6, 1, 9])
    scales = term_scales(LossWeights(text=1.75, audio_text=1.5), {"text": 6, "audio_text": 5})
    out = model(model.embed_rows(batch.ids_T5), batch.cu_seqlens, batch.positions)
    want = torch.zeros(())
    for start, end in ((0, 6), (6, 7), (7, 16)):
        for t in range(start, end - 1):
            term = {int(LossKind.TEXT): "text", int(LossKind.AUDIO_TEXT): "audio_text"}.get(
                int(batch.loss_kind_T[t + 1])
            )
            if term:
                logits = model.text_logits(out.ahead_TD[t])
                want = want + 0.1 * scales[term] * F.cross_entropy(logits, batch.labels_T5[t + 1, 0])
    got = ahead_objective(model, out.ahead_TD, batch, scales, 0.1)
    torch.testing.assert_close(got, want)
    got.backward()
    untouched = [n for n, p in model.named_parameters() if "mtp" in n and (p.grad is None or not p.grad.any())]
    assert untouched == []
    assert model.model.layers[0].mlps[0].down_proj.weight.grad.any(), "the backbone learns from it too"


def test_a_prediction_does_not_see_its_target_nor_another_sequence(model: LanguageModel) -> None:
    batch = batch_of([8, 8])
    with torch.no_grad():
        rows = model.embed_rows(batch.ids_T5)
        before = model(rows, batch.cu_seqlens, batch.positions).ahead_TD
        changed = rows.clone()
        changed[5] += 1.0
        after = model(changed, batch.cu_seqlens, batch.positions).ahead_TD
    # Not bit for bit: how many rows an expert multiplies at a time depends on every row of the pack.
    torch.testing.assert_close(before[:4], after[:4], rtol=1e-4, atol=1e-5, msg="row 3 reads tokens up to 4 only")
    assert not torch.allclose(before[4], after[4], atol=1e-2)
    torch.testing.assert_close(before[8:], after[8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cu", "want"), [((0, 3, 3, 4), [1, 2, 2, 3]), ((0, 0), []), ((0, 1), [0])], ids=str)
def test_next_rows(cu: tuple[int, ...], want: list[int]) -> None:
    assert next_rows(cu, torch.device("cpu")).tolist() == want


def test_full_size_head_has_the_published_parameter_count_and_names() -> None:
    with torch.device("meta"):
        model = LanguageModel(LanguageConfig(num_layers=1, n_routed_experts=2, mtp_layers=1))
    count = sum(p.numel() for p in model.model.mtp.parameters())
    assert round(count / 1e6, 1) == 392.6
    names = {part.name for part in weights.language_parts(model.config) if part.name.startswith("model.mtp.")}
    layer = "model.mtp.layers.0."
    attention = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    assert names == {
        "model.mtp.norm.weight",
        *(f"{layer}{kind}.weight" for kind in ("eh_proj", "enorm.m", "hnorm.m")),
        *(f"{layer}{kind}.weight" for kind in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}self_attn.{kind}.weight" for kind in attention),
        *(f"{layer}transformer_layer.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
    }


def test_folder_keeps_the_head_and_a_model_without_one_passes_it_over(model: LanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"mtp_layers": 1', '"mtp_layers": 0'))
    plain = LanguageModel.from_pretrained(tmp_path)
    assert plain.model.mtp is None
    assert torch.equal(plain.model.norm.weight, model.model.norm.weight)


def test_without_the_head_nothing_is_added() -> None:
    plain = LanguageModel(model_preset("tiny").language)
    batch = batch_of([5])
    out = plain(plain.embed_rows(batch.ids_T5), batch.cu_seqlens, batch.positions)
    assert out.ahead_TD is None
    assert ahead_objective(plain, out.ahead_TD, batch, {}, 0.1) == 0.0
