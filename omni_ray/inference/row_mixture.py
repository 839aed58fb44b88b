"""The shortcut branch over few rows: the router's choice, products of the busy experts, and the sum per token.

A row's result depends on neither the others' choices nor their number: an expert with one row computes one more, which
is its neighbour's or filler, and the neighbour's own expert writes over it.
"""

# T rows with filler, H model dim, E experts and zero experts, K chosen, P rows of chosen FFN experts by expert

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.inference.row_memory import RowMemory
from omni_ray.inference.row_weights import ExpertWeights, product_into


class Chosen(NamedTuple):
    """What the router chose for the real rows."""

    token_P: NDArray[np.int64]
    """Rows that go to FFN experts, expert after expert, tokens in order inside each."""
    share_P: NDArray[np.float32]
    """Weight of each."""
    counts: list[tuple[int, int]]
    """(expert, rows) of the busy ones, in their order."""
    zero_T: NDArray[np.float32]
    """Share of every token's zero-computation experts together."""


def mixture(memory: RowMemory, weights: ExpertWeights) -> Tensor:
    """Shortcut output of the rows in ``memory.u_TH``: [T, H], real rows only, valid until the next call."""
    like = memory.u_TH
    u32_TH = like if like.dtype == torch.float32 else like.float()
    product_into(u32_TH, weights.router, memory.scores)
    chosen = choose(torch.softmax(memory.scores_real_TE, dim=-1).cpu().numpy(), weights)
    zero_T1 = torch.from_numpy(chosen.zero_T[:, None]).to(like.device, like.dtype)
    out_TH = torch.mul(memory.u_real_TH, zero_T1, out=memory.shortcut_TH)
    rows = len(chosen.token_P)
    if rows == 0:
        return out_TH
    token_P = torch.from_numpy(chosen.token_P).to(like.device)
    share_P1 = torch.from_numpy(chosen.share_P[:, None]).to(like.device, like.dtype)
    x_PH, inner_PF, up_PF, down_PH = memory.expert_rows(rows)
    torch.index_select(memory.u_TH, 0, token_P, out=x_PH)
    # Lone rows take a filler row along; only the last one's stands behind the rows.
    spans, start = [], 0
    for expert, count in chosen.counts:
        spans.append((expert, memory.expert_span(start, memory.weights.padded(count))))
        start += count
    for expert, span in spans:
        product_into(span.x_BH, weights.gate_up[expert], span.gate_up)
    F.silu(inner_PF, inplace=True).mul_(up_PF).mul_(share_P1)
    for expert, span in spans:
        product_into(span.inner_BF, weights.down[expert], span.out)
    return out_TH.index_add_(0, token_P, down_PH)


def choose(scores_TE: NDArray[np.float32], weights: ExpertWeights) -> Chosen:
    """Top-k of the corrected scores; weights are the scores themselves, scaled (networks.md section 1).

    Of equal scores the first is chosen.  Sums and comparisons run in fp64, so that one row by itself, for which plain
    lists are several times as fast, chooses what it would beside others.

    Args:
        scores_TE: Softmax of the router, real rows.
    """
    if len(scores_TE) == 1:
        return _choose_one(scores_TE[0].tolist(), weights)
    ffn, top_k = len(weights.down), weights.top_k
    corrected_TE = scores_TE.astype(np.float64) + weights.bias_E
    expert_TK = (-corrected_TE).argsort(axis=1, kind="stable")[:, :top_k]
    flat = expert_TK.ravel()
    order = flat.argsort(kind="stable")
    token_P = order // top_k
    counts = np.bincount(flat, minlength=ffn)[:ffn]
    real = int(counts.sum())
    share_P = scores_TE[token_P, flat[order]].astype(np.float64) * weights.scaling
    zero_T = np.zeros(len(scores_TE))
    np.add.at(zero_T, token_P[real:], share_P[real:])
    busy = counts.nonzero()[0]
    return Chosen(
        token_P[:real],
        share_P[:real].astype(np.float32),
        list(zip(busy.tolist(), counts[busy].tolist(), strict=True)),
        zero_T.astype(np.float32),
    )


def _choose_one(scores: list[float], weights: ExpertWeights) -> Chosen:
    """:func:`choose` of one row."""
    ffn = len(weights.down)
    below = [-(score + bias) for score, bias in zip(scores, weights.biases, strict=True)]
    chosen = sorted(sorted(range(len(below)), key=below.__getitem__)[: weights.top_k])
    shares = [scores[expert] * weights.scaling for expert in chosen]
    real = sum(expert < ffn for expert in chosen)
    return Chosen(
        np.zeros(real, dtype=np.int64),
        np.array(shares[:real], dtype=np.float32),
        [(expert, 1) for expert in chosen[:real]],
        np.array([sum(shares[real:])], dtype=np.float32),
    )
