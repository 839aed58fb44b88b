"""Packed attention against a loop over sequences, forward and backward; absorbed decoding against both."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.inference.row_weights import row_weights
from omni_ray.models import packed_attention as packed
from omni_ray.models.attention import LatentAttention
from omni_ray.models.llm import LanguageModel
from omni_ray.models.native.attention import attention
from omni_ray.models.rope import Turn, rope_tables

NOPE, ROPE, VALUE, HEADS = 5, 4, 7, 3
PACKINGS = [[1], [16, 16], [3, 40, 17, 1, 33], [150, 20], [600, 9]]
FORMS = ("compiled", "plain")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled functions, and the form without a compiler."""
    name: str = request.param
    if name == "plain":
        monkeypatch.setattr(packed, "attention", lambda _: None)
    elif attention(torch.float32) is None:
        pytest.skip("no C compiler")
    return name


def cu_of(lengths: list[int]) -> list[int]:
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    return cu


def plain_attention(q: Tensor, kv: Tensor, k_rope: Tensor, lengths: list[int]) -> Tensor:
    """The equation, one sequence and head at a time."""
    cos, sin = rope_tables(torch.cat([torch.arange(n) for n in lengths]), ROPE, 50.0)

    def rotate(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    outs = []
    for start, end in pairwise(cu_of(lengths)):
        heads = []
        for h in range(HEADS):
            query = torch.cat([q[:, h, :NOPE], rotate(q[:, h, NOPE:])], dim=-1)[start:end]
            key = torch.cat([kv[:, h, :NOPE], rotate(k_rope)], dim=-1)[start:end]
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            probs = (query @ key.T).masked_fill(future, -math.inf).softmax(-1)
            heads.append(probs @ kv[start:end, h, NOPE:])
        outs.append(torch.stack(heads, dim=1))
    return torch.cat(outs)


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, NOPE + ROPE), (HEADS, NOPE + VALUE), (ROPE,))
    q, kv, k_rope = (torch.randn(sum(lengths), *shape, generator=generator).requires_grad_() for shape in shapes)
    return q, kv, k_rope


def layout_of(lengths: list[int]) -> packed.PackedLayout:
    turn = Turn(*rope_tables(torch.cat([torch.arange(n) for n in lengths]), ROPE, 50.0))
    return packed.packed_layout(cu_of(lengths), HEADS, turn)


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
def test_forward_and_backward_equal_the_plain_equation(lengths: list[int], form: str) -> None:
    ours, theirs = inputs(lengths), inputs(lengths)
    got = packed.packed_attention(*ours, NOPE, layout_of(lengths))
    assert ("_Compiled" in type(got.grad_fn).__name__) == (form == "compiled")
    want = plain_attention(*theirs, lengths)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


def close_to_plain(kernel: Any, lengths: list[int], tolerance: float, device: str = "cpu") -> None:
    ours, theirs = inputs(lengths), inputs(lengths)
    turn = Turn(*(x.to(device) for x in rope_tables(torch.cat([torch.arange(n) for n in lengths]), ROPE, 50.0)))
    layout = packed.packed_layout(cu_of(lengths), HEADS, turn)
    got = kernel(*(t.to(device) for t in ours), NOPE, layout).cpu()
    want = plain_attention(*theirs, lengths)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
def test_the_kernel_of_gpus_equals_the_plain_equation_here_too(lengths: list[int]) -> None:
    close_to_plain(packed.fused_attention, lengths, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
def test_attention_on_a_gpu_equals_the_plain_equation(lengths: list[int]) -> None:
    close_to_plain(packed.packed_attention, lengths, 1e-3, device="cuda")


def test_gradients_pass_gradcheck() -> None:
    lengths = [2, 5]
    tensors = [t.detach().double().requires_grad_() for t in inputs(lengths)]
    layout = layout_of(lengths)
    assert torch.autograd.gradcheck(
        lambda q, kv, k: packed.packed_attention(q, kv, k, NOPE, layout), tensors, atol=1e-6, rtol=1e-4
    )


def test_a_sequence_has_the_same_bits_whoever_stands_beside_it(form: str) -> None:
    lengths = [20, 37, 5, 37, 130]
    tensors = inputs(lengths)
    together = packed.packed_attention(*tensors, NOPE, layout_of(lengths))
    for length, (start, end) in zip(lengths, pairwise(cu_of(lengths)), strict=True):
        alone = packed.packed_attention(
            tensors[0][start:end], tensors[1][start:end], tensors[2][start:end], NOPE, layout_of([length])
        )
        assert torch.equal(alone, together[start:end])


def test_recomputed_probabilities_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "attention", lambda _: None)  # the compiled form keeps none at all

    def gradients() -> list[Tensor | None]:
        tensors = inputs([140, 30])
        packed.packed_attention(*tensors, NOPE, layout_of([140, 30])).square().sum().backward()
        return [t.grad for t in tensors]

    kept = gradients()
    monkeypatch.setattr(packed, "RECOMPUTE_ABOVE", 10)
    for a, b in zip(kept, gradients(), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def config() -> LanguageConfig:
    return model_preset("tiny").language


def test_absorbed_attention_equals_the_expanded_one(config: LanguageConfig) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config)
    attention = model.model.layers[0].self_attn[0]
    assert isinstance(attention, LatentAttention)
    x_TH = torch.randn(9, config.hidden_size)
    turn = Turn(*rope_tables(torch.arange(9), config.qk_rope_head_dim, 1e4))
    whole = attention(x_TH, packed.packed_layout([0, 9], attention.heads, turn))
    with torch.no_grad():
        held = row_weights(model).layers[0].attention[0]
        q, latent, k_rope = attention.project(x_TH)
        # Decoding keeps latents over their norm; gain and scale are in the weights behind them.
        latent = latent / (attention.kv_a_layernorm.weight * attention.kv_gain * math.sqrt(attention.kv_rank))
        k_rope = turn.turned(k_rope[None, :, None])[0, :, 0]
        q_rope = turn.turned(q[None, ..., attention.nope :])[0]
        query = torch.cat([torch.einsum("thn,hnc->thc", q[..., : attention.nope], held.key_up), q_rope], dim=2)
        scores = torch.einsum("thx,sx->ths", query, torch.cat([latent, k_rope], dim=1))
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)[:, None]
        probs = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("ths,sc->thc", probs, latent)
        out = torch.einsum("thc,hce->the", mixed, held.value_up).flatten(1) @ torch.cat(held.out, dim=1)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
