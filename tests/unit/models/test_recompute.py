"""Making activations again: the same bits, less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omni_ray.config.curriculum import LossWeights
from omni_ray.config.model import LanguageConfig, model_preset
from omni_ray.models import cross_entropy
from omni_ray.models.llm import LanguageModel
from omni_ray.models.recompute import RecomputeMode, offer
from omni_ray.training.loss import ahead_objective, objective, term_scales
from omni_ray.types.batch import LossKind, OmniBatch
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
    assert selective < 0.8 * none
    assert full < 0.45 * none


class Largest(TorchDispatchMode):
    """The most values that any operation's result holds."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return out


@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_never_holds_logits_of_all_rows(mode: RecomputeMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, audio and multi-token-prediction heads together, forward and backward."""
    rows, vocabulary, chunk = 192, 8192, 32
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
    config = model_preset("tiny").language.model_copy(
        update={"vocab_size": vocabulary, "codec_vocab_size": vocabulary, "mtp_layers": 1, "num_layers": 1}
    )
    model = LanguageModel(config, seed=1)
    model.recompute = mode
    ids = torch.full((rows, 5), 40)
    kinds = torch.full((rows,), int(LossKind.AUDIO_TEXT))
    batch = OmniBatch(ids_T5=ids, cu_seqlens=(0, rows), labels_T5=ids, loss_kind_T=kinds, positions=torch.arange(rows))
    scales = term_scales(LossWeights(), {"audio_text": rows} | {f"audio_{c}": rows for c in range(4)})
    with Largest() as largest:
        output = model(model.embed_rows(ids), batch.cu_seqlens, batch.positions)
        loss, _ = objective(model, output.hidden_TD, batch, scales)
        (loss + ahead_objective(model, output.ahead_TD, batch, scales, 0.1)).backward()
    weights = max(parameter.numel() for parameter in model.parameters())
    assert weights < rows * vocabulary
    assert chunk * vocabulary <= largest.values <= max(weights, chunk * vocabulary)
    with Largest() as all_at_once:
        model.text_logits(output.hidden_TD.detach())
    assert all_at_once.values == rows * vocabulary, "what the step above must not hold, and would have been seen"


def test_an_offer_outside_of_a_selective_layer_changes_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    offer(y, lambda: torch.zeros(3))
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.exp())
