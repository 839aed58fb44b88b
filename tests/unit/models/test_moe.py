"""Experts against a loop over tokens; router, zero experts and balance loss against their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.inference.row_memory import RowMemory
from omni_ray.inference.row_mixture import mixture
from omni_ray.inference.row_weights import row_weights
from omni_ray.models import grouped_experts
from omni_ray.models.layers import RMSNorm, row_padded, swiglu
from omni_ray.models.llm import LanguageModel
from omni_ray.models.moe import MoE, balance_loss, expert_counts

CONFIG = model_preset("tiny").language


def moe(seed: int = 0, config: LanguageConfig = CONFIG) -> MoE:
    torch.manual_seed(seed)
    module = MoE(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.08)
        module.router.classifier.weight.normal_(0, 0.3)
    return module


def slow_moe(module: MoE, u_TH: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out = []
    for u in u_TH:
        p = (module.router.classifier.weight @ u).softmax(0)
        chosen = (p + module.router.e_score_correction_bias).topk(CONFIG.moe_topk).indices
        y = torch.zeros_like(u)
        for expert in chosen.tolist():
            weight = CONFIG.routed_scaling_factor * p[expert]
            if expert >= CONFIG.n_routed_experts:
                y = y + weight * u
                continue
            gate, up = (module.experts.gate_up_proj[expert] @ u).chunk(2)
            y = y + weight * (module.experts.down_proj[expert] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


def test_forward_and_gradients_equal_the_slow_one() -> None:
    ours, slow = moe(), moe()
    with torch.no_grad():
        for module in (ours, slow):
            module.router.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.1, 12))
    u = torch.randn(40, CONFIG.hidden_size)
    mine, other = u.clone().requires_grad_(), u.clone().requires_grad_()
    got, _ = ours(mine)
    want = slow_moe(slow, other)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)
    for (name, a), b in zip(ours.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("rows", [1, 7, 16, 40])
def test_blocks_of_rows_change_no_result(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.randn(40, CONFIG.hidden_size)

    def forward_backward() -> list[Tensor]:
        module, x = moe(), u.clone().requires_grad_()
        out, _ = module(x)
        out.square().sum().backward()
        return [out, *(tensor.grad for tensor in (x, *module.parameters()) if tensor.grad is not None)]

    whole = forward_backward()
    monkeypatch.setattr(grouped_experts, "BLOCK_ROWS", rows)
    for mine, want in zip(forward_backward(), whole, strict=True):
        assert (mine - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 0, 2], [5, 1, 9], [0, 12, 0], [1, 1, 8]])
def test_blocks_cover_every_row_once_and_end_with_an_expert_unless_it_is_longer(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_experts, "BLOCK_ROWS", 4)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    seen: list[int] = []
    for experts, rows, ends_E in grouped_experts._blocks(ends):
        sizes = ends_E.diff(prepend=torch.zeros(1, dtype=ends_E.dtype))
        mine = torch.repeat_interleave(torch.arange(len(counts))[experts], sizes)
        assert torch.equal(mine, owners[rows])
        assert len(mine) <= 4
        seen += range(rows.start, rows.stop)
    assert seen == list(range(len(owners)))


def test_inference_kernel_equals_the_training_one_and_ignores_neighbours() -> None:
    model = LanguageModel(CONFIG)
    model.model.layers[0].mlp = moe()
    held = row_weights(model)
    u = torch.randn(50, CONFIG.hidden_size)

    def kernel(rows: slice) -> Tensor:
        memory = RowMemory(held, len(u[rows]))
        memory.u_real_TH.copy_(u[rows])
        return mixture(memory, held.layers[0].experts)

    with torch.inference_mode():
        whole = kernel(slice(0, 50))
        training, _ = moe()(u)
        torch.testing.assert_close(whole, training, rtol=1e-4, atol=1e-5)
        for rows in (slice(0, 1), slice(7, 10), slice(20, 50), slice(3, 4)):
            assert torch.equal(kernel(rows), whole[rows])


@pytest.mark.parametrize("chosen", [0, 9], ids=["one FFN expert takes all", "zero experts take all"])
def test_lopsided_routing(chosen: int) -> None:
    module = moe()
    with torch.no_grad():
        module.router.e_score_correction_bias[[chosen, 10, 11]] = 5.0
    u = torch.randn(20, CONFIG.hidden_size, requires_grad=True)
    out, routing = module(u)
    assert set(routing.expert_TK.flatten().tolist()) == {chosen, 10, 11}
    torch.testing.assert_close(out, slow_moe(module, u), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert expert_counts(routing.expert_TK, 12).tolist() == [20 if e in (chosen, 10, 11) else 0 for e in range(12)]


def test_balance_loss_is_the_equation_and_adds_over_packing() -> None:
    module = moe()
    u = torch.randn(30, CONFIG.hidden_size)
    with torch.no_grad():
        routing = module.router(u)
    for groups in (8, 2):
        want = 0.0
        for start, end in ((0, 12), (12, 30)):
            p = routing.scores_TE[start:end].mean(0)
            counts = torch.bincount(routing.expert_TK[start:end].flatten(), minlength=12).float()
            length, size = end - start, 8 // groups
            for j in range(groups):
                f = groups / (2.0 * length) * counts[j * size : (j + 1) * size].sum()
                want += float(length * f * p[j * size : (j + 1) * size].sum())
            want += float(length * counts[8:].sum() / ((3 - 2.0) * length) * p[8:].sum())
        got = balance_loss(routing, [0, 12, 30], CONFIG, groups)
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-3)


def test_router_stays_fp32_when_the_model_is_cast() -> None:
    module = moe().to(torch.bfloat16)
    assert module.router.classifier.weight.dtype == torch.float32
    assert module.router.e_score_correction_bias.dtype == torch.float32
    assert module.experts.down_proj.dtype == torch.bfloat16
    assert torch.equal(module.router.classifier.weight, moe().router.classifier.weight)
    out, routing = module(torch.randn(5, CONFIG.hidden_size, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert routing.weight_TK.dtype == torch.float32


def test_norm_and_gate_backwards_equal_autograd() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(12, 1e-5).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-5), rtol=1e-5, atol=1e-6)
    x32 = torch.randn(7, 12, requires_grad=True)
    ours, theirs = RMSNorm(12, 1e-5), torch.ones(12, requires_grad=True)
    weight = torch.randn(7, 12)
    (ours(x32) * weight).sum().backward()
    mine, x32.grad = x32.grad, None
    (F.rms_norm(x32, (12,), theirs, 1e-5) * weight).sum().backward()
    torch.testing.assert_close(mine, x32.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.grad)
    gate_up = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, [gate_up])


@pytest.mark.parametrize("rows", [1, 5, 16, 23], ids="{} rows".format)
def test_row_padded_gives_the_same_bits_for_any_row_count(rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 160), torch.randn(64, 160)
    whole = F.linear(x, weight)
    assert torch.equal(row_padded(lambda part: F.linear(part, weight), x[:rows]), whole[:rows])
