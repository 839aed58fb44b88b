"""Head and cross-entropy in chunks: torch's own numbers, never the logits of all rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.models import cross_entropy
from omni_ray.models.cross_entropy import linear_cross_entropy
from pipelines.live_bytes import LiveBytes


def inputs(rows: int, vocabulary: int = 50, hidden: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, hidden, generator=generator)
    w = torch.randn(vocabulary, hidden, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return h, w, labels, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("scale", [1.0, 0.25], ids=["seed 1", "seed 0.25"])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 21])
def test_loss_and_gradients_equal_torch(rows: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)
    h, w, labels, factor = inputs(rows)
    mine, theirs = [(h.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    loss, ce = linear_cross_entropy(*mine, labels, factor)
    want = F.cross_entropy(theirs[0] @ theirs[1].T, labels, reduction="none")
    torch.testing.assert_close(ce, want.detach())
    (loss * scale).backward()
    ((want * factor).sum() * scale).backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bf16_products_are_summed_in_fp32() -> None:
    h, w, labels, factor = inputs(2000, hidden=64)
    w16 = w.bfloat16().requires_grad_()
    h16 = h.bfloat16()
    linear_cross_entropy(h16, w16, labels, factor)[0].backward()
    exact = w16.detach().double().requires_grad_()
    (F.cross_entropy(h16.double() @ exact.T, labels, reduction="none") * factor).sum().backward()
    assert w16.grad.dtype == torch.bfloat16
    error = (w16.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 5e-3


def test_frozen_sides_get_no_gradient_and_a_second_backward_is_refused() -> None:
    h, w, labels, factor = inputs(5)
    loss, ce = linear_cross_entropy(h.requires_grad_(), w, labels, factor)
    loss.backward(retain_graph=True)
    assert w.grad is None
    assert not ce.requires_grad
    with pytest.raises(RuntimeError, match="made once; run the forward again"):
        loss.backward()


def test_peak_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    def peak(rows: int) -> int:
        h, w, labels, factor = inputs(rows, vocabulary=4000)
        with LiveBytes([h, w, labels, factor]) as bytes_:
            linear_cross_entropy(h.requires_grad_(), w.requires_grad_(), labels, factor)[0].backward()
        return bytes_.peak

    small, large = peak(512), peak(8 * 512)
    assert large - small < 8 * 512 * 12 * 4 * 4, "a few values of model width a row, no logits"
