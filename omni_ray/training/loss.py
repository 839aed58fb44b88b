"""The objective: sums divided by the step's global counts, never means of means (networks.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from omni_ray.config.curriculum import LossWeights
from omni_ray.models.cross_entropy import linear_cross_entropy
from omni_ray.models.mtp import next_rows
from omni_ray.types.batch import IGNORE, NUM_CODEBOOKS, LossKind, OmniBatch

TERMS = ("text", "audio_text", "pad_text", "vision", "audio_0", "audio_1", "audio_2", "audio_3")
"""Loss terms in the order of their sums."""


class Heads(Protocol):
    """What the objective asks of a language model."""

    @property
    def text_head(self) -> Tensor: ...
    def audio_head(self, codebook: int) -> Tensor: ...


class Router(Protocol):
    """What the auxiliary losses ask of a forward's output: both summed over layers and rows."""

    @property
    def balance_loss(self) -> Tensor: ...
    @property
    def z_loss(self) -> Tensor: ...


def term_scales(weights: LossWeights, counts: Mapping[str, int]) -> dict[str, float]:
    """Factor of one row's cross-entropy, by term: weight over the global count of the step.

    Pad-text rows join the audio_text mean with weight ``pad_text``; the audio term is the mean over four heads, and
    head 0 carries the first_audio term on top.  Source: report Stage 1 objective; reductions networks.md section 6 [A].
    """
    pad = weights.pad_text
    audio_text = counts.get("audio_text", 0) + pad * counts.get("pad_text", 0)
    scales = {
        "text": weights.text / max(1, counts.get("text", 0)),
        "vision": weights.vision / max(1, counts.get("vision", 0)),
        "audio_text": weights.audio_text / audio_text if audio_text else 0.0,
        "pad_text": weights.audio_text * pad / audio_text if audio_text else 0.0,
    }
    for codebook in range(NUM_CODEBOOKS):
        scale = weights.audio / NUM_CODEBOOKS + (weights.first_audio if codebook == 0 else 0.0)
        scales[f"audio_{codebook}"] = scale / max(1, counts.get(f"audio_{codebook}", 0))
    return scales


def auxiliary(output: Router, weights: LossWeights, counts: Mapping[str, int]) -> Tensor:
    """Load-balance and z losses of one micro-batch, as its share of the step's mean over rows."""
    rows = max(1, counts.get("rows", 0))
    return output.balance_loss * (weights.balance / rows) + output.z_loss * (weights.z / rows)


def objective(heads: Heads, hidden_TD: Tensor, batch: OmniBatch, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Loss of one micro-batch.

    Args:
        heads: The language model.  hidden_TD: [T, D] final hidden rows.
        batch: Labels and kinds.  scales: Output of :func:`term_scales`.
    Returns:
        The scalar loss (its sum over the step's micro-batches is the step's loss), and [8] detached fp64 sums of
        cross-entropy by term, in the order of ``TERMS``.
    """
    sums = torch.zeros(len(TERMS), dtype=torch.float64)
    total = hidden_TD.new_zeros((), dtype=torch.float32)
    kinds = batch.loss_kind_T
    rows = (kinds != LossKind.NONE).nonzero().squeeze(1)
    if rows.numel():
        kind = kinds[rows]
        factor = _text_factors(scales, kind.device)
        loss, ce = linear_cross_entropy(hidden_TD[rows], heads.text_head, batch.labels_T5[rows, 0], factor[kind])
        for loss_kind, term in _TEXT_TERMS.items():
            sums[TERMS.index(term)] = ce[kind == loss_kind].double().sum().cpu()
        total = total + loss
    for codebook in range(NUM_CODEBOOKS):
        labels, term = batch.labels_T5[:, 1 + codebook], f"audio_{codebook}"
        rows = (labels != IGNORE).nonzero().squeeze(1)
        if rows.numel():
            factor = torch.full((rows.numel(),), scales[term], device=rows.device)
            loss, ce = linear_cross_entropy(hidden_TD[rows], heads.audio_head(codebook), labels[rows], factor)
            sums[TERMS.index(term)] = ce.double().sum().cpu()
            total = total + loss
    return total, sums


def ahead_objective(
    heads: Heads, ahead_TD: Tensor | None, batch: OmniBatch, scales: Mapping[str, float], weight: float
) -> Tensor | float:
    """Multi-token-prediction loss of one micro-batch: row t answers for the text label of row t + 1.

    Args:
        heads: The language model; its text head is shared.  ahead_TD: [T, D] of the head, or None without one.
        batch: Labels and kinds.  scales: Output of :func:`term_scales`.  weight: Over that of the label's own term.
    Returns:
        The scalar loss, divided by the counts of the terms as they are: the first label of a sequence has no row
        that predicts it this way.  Zero without a head.
    Source: networks.md section 4, MTP head.
    """
    if ahead_TD is None or not weight:
        return 0.0
    next_T = next_rows(batch.cu_seqlens, ahead_TD.device)
    has_next_T = next_T != torch.arange(len(next_T), device=next_T.device)
    kind_T = batch.loss_kind_T[next_T]
    rows = (has_next_T & (kind_T != LossKind.NONE)).nonzero().squeeze(1)
    if not rows.numel():
        return 0.0
    factor = _text_factors(scales, rows.device)[kind_T[rows]] * weight
    loss, _ = linear_cross_entropy(ahead_TD[rows], heads.text_head, batch.labels_T5[next_T[rows], 0], factor)
    return loss


def _text_factors(scales: Mapping[str, float], device: torch.device) -> Tensor:
    factor = torch.zeros(len(LossKind), device=device)
    for loss_kind, term in _TEXT_TERMS.items():
        factor[loss_kind] = scales[term]
    return factor


_TEXT_TERMS = {
    LossKind.TEXT: "text",
    LossKind.AUDIO_TEXT: "audio_text",
    LossKind.VISION: "vision",
    LossKind.PAD_TEXT: "pad_text",
}


def means(sums: Tensor, counts: Mapping[str, int]) -> dict[str, float]:
    """Mean cross-entropy by term for people to read; terms without rows are left out."""
    return {term: float(sums[place]) / counts[term] for place, term in enumerate(TERMS) if counts.get(term, 0)}
