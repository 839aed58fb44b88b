"""Making activations again: the same bits, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.models.llm import LanguageModel
from omni_ray.models.recompute import RecomputeMode, offer
from pipelines.live_bytes import LiveBytes

MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
CONFIG = model_preset("tiny").language.model_copy(update={"num_layers": 4})


def run(mode: RecomputeMode, dtype: torch.dtype, lengths: list[int]) -> dict[str, Tensor]:
    model = LanguageModel(CONFIG, seed=1).to(dtype)
    model.recompute = mode
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 130, (sum(lengths), 5), generator=generator)
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    out = model(model.embed_rows(ids), cu, torch.cat([torch.arange(n) for n in lengths]))
    loss = model.text_logits(out.hidden_TD).float().logsumexp(-1).sum() + out.balance_loss + out.z_loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach(), "counts": out.expert_counts_LE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES[1:])
def test_gradients_are_those_of_keeping_everything_bit_for_bit(mode: RecomputeMode, dtype: torch.dtype) -> None:
    kept, made = (run(m, dtype, [40, 140, 7]) for m in ("none", mode))
    assert kept.keys() == made.keys()
    assert [name for name in kept if not torch.equal(kept[name], made[name])] == []


def activation_peak(mode: RecomputeMode, config: LanguageConfig, rows: int) -> int:
    model = LanguageModel(config, seed=1)
    model.recompute = mode
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes(model.parameters()) as bytes_:
        x = model.embed_rows(torch.full((rows, 5), 40))
        model(x, [0, rows], torch.arange(rows), auxiliary=False).hidden_TD.sum().backward()
    return bytes_.peak


def test_less_is_kept_the_more_is_made_again() -> None:
    config = CONFIG.model_copy(update={"num_layers": 8})
    none, selective, full = (activation_peak(mode, config, 256) for mode in MODES)
    assert selective < 0.75 * none
    assert full < 0.45 * none


def test_an_offer_outside_of_a_selective_layer_changes_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    offer(y, lambda: torch.zeros(3))
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.exp())
