"""Mixture of experts with zero-computation experts: router, experts, balance loss."""

# T packed tokens, H model dim, E experts (FFN first, then zero-computation), N FFN experts, K chosen per token
# F inner dim of an expert, M chosen (token, FFN expert) pairs, S sequences

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models.grouped_experts import grouped_experts
from omni_ray.models.products import linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The router's choice for every token."""

    scores_TE: Tensor
    """Softmax over all experts, fp32; differentiable."""
    expert_TK: Tensor
    """Chosen experts, FFN and zero alike."""
    weight_TK: Tensor
    """Scaled score of each chosen expert, not renormalised, fp32."""


class Router(nn.Module):
    """fp32 softmax router whose selection, not weight, is corrected by a bias buffer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        experts = config.n_routed_experts + config.zero_expert_num
        self.top_k = config.moe_topk
        self.scaling = config.routed_scaling_factor
        self.classifier = nn.Linear(config.hidden_size, experts, bias=False)
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting a model leaves its router in fp32: rounded scores would choose other experts.
        fp32 = (self.classifier.weight.detach(), self.e_score_correction_bias.detach())
        super()._apply(fn, recurse)
        for before, after in zip(fp32, (self.classifier.weight, self.e_score_correction_bias), strict=True):
            if after.dtype != before.dtype:
                after.data = before.to(after.device)
        return self

    def forward(self, u_TH: Tensor) -> Routing:
        """Source: networks.md section 4, router."""
        logits_TE = linear(u_TH.float(), self.classifier.weight.float())
        scores_TE = logits_TE.softmax(dim=-1)
        with torch.no_grad():
            expert_TK = (scores_TE + self.e_score_correction_bias.float()).topk(self.top_k, dim=-1).indices
        return Routing(
            scores_TE=scores_TE, expert_TK=expert_TK, weight_TK=scores_TE.gather(1, expert_TK) * self.scaling
        )


class Experts(nn.Module):
    """Weights of the FFN experts, fused over experts (one file entry per expert and matrix on disk)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        count, inner, hidden = config.n_routed_experts, config.expert_ffn_hidden_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        """[N, 2F, H], gate first."""
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        """[N, H, F]."""


class MoE(nn.Module):
    """Shortcut branch of a layer: FFN experts plus zero-computation experts that return their input."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.num_ffn = config.n_routed_experts
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, u_TH: Tensor) -> tuple[Tensor, Routing]:
        """[T, H] -> [T, H] and the routing, for counts and the balance loss."""
        routing = self.router(u_TH)
        held = (self.experts.gate_up_proj, self.experts.down_proj)
        out = grouped_experts(u_TH, routing.weight_TK, routing.expert_TK, *held)
        return combine_zero_experts(out, u_TH, routing.weight_TK, routing.expert_TK, self.num_ffn), routing


def combine_zero_experts(
    out_TH: Tensor, u_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, num_ffn_experts: int
) -> Tensor:
    """Add the share of each token that identity experts carry: E_i(u) = u.  [T, H] -> [T, H]."""
    share_T = (weight_TK * (expert_TK >= num_ffn_experts)).sum(dim=-1)
    return torch.addcmul(out_TH, u_TH, share_T.unsqueeze(-1).to(u_TH.dtype))


def expert_counts(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Assignments per expert, [E] int64."""
    return torch.bincount(expert_TK.flatten(), minlength=num_experts)


def balance_loss(routing: Routing, cu_seqlens: Sequence[int], config: LanguageConfig, groups: int) -> Tensor:
    """Load-balance loss of one layer without its weight alpha, summed over sequences, each times its length.

    Dividing the sum over layers by the step's token count gives the token mean, whatever the packing.

    Args:
        routing: Of this layer.  cu_seqlens: Packing.
        groups: D, groups of FFN experts (expert-parallel ranks); the zero experts are one more group.
    Source: networks.md 4: sum_j f_j P_j, f_j = D/(K_e T) assignments to j, f_{D+1} = assignments / ((K - K_e) T).
    """
    ffn, zero = config.n_routed_experts, config.zero_expert_num
    starts, ends = torch.tensor(cu_seqlens[:-1]), torch.tensor(cu_seqlens[1:])
    token_T = torch.arange(routing.scores_TE.shape[0])
    member_ST = ((token_T >= starts.unsqueeze(1)) & (token_T < ends.unsqueeze(1))).to(routing.scores_TE)
    lengths_S1 = member_ST.sum(dim=1, keepdim=True).clamp_min(1.0)
    assigned_TE = torch.zeros_like(routing.scores_TE).scatter_(1, routing.expert_TK, 1.0)
    to_group_EJ = torch.zeros(ffn + zero, groups + 1).to(routing.scores_TE)
    to_group_EJ[torch.arange(ffn), torch.arange(ffn) * groups // ffn] = 1.0
    to_group_EJ[ffn:, groups] = 1.0
    prob_SJ = member_ST @ routing.scores_TE @ to_group_EJ / lengths_S1
    share_SJ = member_ST @ assigned_TE @ to_group_EJ / lengths_S1
    wanted_zero = config.moe_topk - config.target_ffn_experts
    factor_J = share_SJ.new_full((groups + 1,), groups / config.target_ffn_experts)
    factor_J[groups] = 1.0 / wanted_zero if wanted_zero > 0 else 0.0
    return (lengths_S1 * (share_SJ * factor_J) * prob_SJ).sum()
