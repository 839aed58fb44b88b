"""The language backbone: summed text and codec embeddings in, one hidden state per row out, five heads."""

# T packed rows, R rows, H model dim, V text vocabulary, E experts, L layers

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models import weights
from omni_ray.models.block import ShortcutLayer
from omni_ray.models.initialise import initialise_language
from omni_ray.models.layers import RMSNorm
from omni_ray.models.moe import Routing, balance_loss, expert_counts
from omni_ray.models.mtp import MultiTokenPrediction
from omni_ray.models.packed_attention import PackedLayout, packed_layout
from omni_ray.models.products import Linear
from omni_ray.models.recompute import RecomputeMode, layer_runner
from omni_ray.models.rope import Turn, rope_tables
from omni_ray.models.tensor_files import SHARD_BYTES
from omni_ray.types.batch import AUDIO_PAD


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageOutput:
    """What one forward over packed rows gives."""

    hidden_TD: Tensor
    """[T, H] after the final norm; feed rows of it to text_logits and audio_logits."""
    expert_counts_LE: Tensor
    """[layers, N + Z] int64: assignments of this call, for the bias controller."""
    balance_loss: Tensor
    """Scalar: load-balance loss without its weight, summed over layers and tokens (divide by the step's rows)."""
    z_loss: Tensor
    """Scalar: squared log-sum-exp of |hidden| before the final norm, summed over tokens, without its weight."""
    ahead_TD: Tensor | None = None
    """[T, H] rows whose text head predicts the token after the next; None without a multi-token-prediction head."""


class Backbone(nn.Module):
    """Everything under ``model.`` in the published names."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ShortcutLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp = MultiTokenPrediction(config) if config.mtp_layers else None


class LanguageModel(nn.Module):
    """LongCat-Flash with four codec tables in and four codec heads out (networks.md sections 3.1 and 4).

    Joint matrices (gate+up, q_a+kv_a, experts) are held fused and split on disk; see ``models/weights.py``.
    """

    def __init__(self, config: LanguageConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.balance_groups = config.n_routed_experts
        self.rope_base = config.rope_theta
        self.recompute: RecomputeMode = "none"
        self.model = Backbone(config)
        self.lm_head = None if config.tie_word_embeddings else _linear(config.hidden_size, config.vocab_size)
        tables = range(config.num_codebooks)
        self.audio_embeddings = nn.ModuleList(
            [nn.Embedding(config.codec_vocab_size, config.hidden_size) for _ in tables]
        )
        self.audio_heads = nn.ModuleList([_linear(config.hidden_size, config.codec_vocab_size) for _ in tables])
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from ``seed``; equal seeds give equal bits, whatever was drawn before."""
        initialise_language(self, self.config, seed)

    def embed_rows(self, ids_R5: Tensor) -> Tensor:
        """Input embedding of rows of one text id and four stored codec ids.

        Args:
            ids_R5: [R, 5] int64; text-pad and codec PAD add nothing, a row of only pads is the text-pad embedding.
        Returns:
            [R, H].
        Source: networks.md section 3.1, input embedding.
        """
        text_R, codes_R4 = ids_R5[:, 0], ids_R5[:, 1 : 1 + self.config.num_codebooks]
        rows_RH: Tensor = self.model.embed_tokens(text_R)
        heard_R4 = codes_R4 != AUDIO_PAD
        with_codes = heard_R4.any(dim=1).nonzero().flatten()
        if with_codes.numel() == 0:
            return rows_RH
        silent_R = (text_R != self.config.pad_token_id) | ~heard_R4.any(dim=1)
        rows_RH = rows_RH * silent_R.unsqueeze(1).to(rows_RH.dtype)
        for codebook, table in enumerate(self.audio_embeddings):
            index = heard_R4[:, codebook].nonzero().flatten()
            rows_RH = rows_RH.index_add(0, index, table(codes_R4[index, codebook]))
        return rows_RH

    def forward(
        self,
        embeddings_TD: Tensor,
        cu_seqlens: Sequence[int],
        positions_T: Tensor,
        *,
        rope_base: float | None = None,
        auxiliary: bool = True,
    ) -> LanguageOutput:
        """Run the layers over packed sequences.

        Args:
            embeddings_TD: [T, H], from :meth:`embed_rows`, media rows already overwritten by features.
            cu_seqlens: 0 and the running sums of the sequence lengths, ending in T.
            positions_T: [T] integers, restarting in every sequence.
            rope_base: theta of this stage; None keeps the last one, at first the config's.
            auxiliary: Compute balance_loss, z_loss and ahead_TD; False leaves them zero and None.
        Raises:
            ValueError: cu_seqlens or the positions do not fit the rows, or (on the CPU) a row is not finite.
        """
        self._check_rows(embeddings_TD, cu_seqlens, positions_T)
        if rope_base is not None:
            # Kept, so that save_pretrained names the base of the last stage and decoding uses it.
            self.rope_base = rope_base
        turn = Turn(*rope_tables(positions_T, self.config.qk_rope_head_dim, self.rope_base))
        layout = packed_layout(cu_seqlens, self.config.num_attention_heads, turn)
        x_TH, routings = self._run_layers(embeddings_TD, layout)
        balance = z_loss = x_TH.new_zeros((), dtype=torch.float32)
        if auxiliary:
            balance = torch.stack(
                [balance_loss(routing, cu_seqlens, self.config, self.balance_groups) for routing in routings]
            ).sum()
            z_loss = x_TH.float().abs().logsumexp(dim=-1).square().sum()
        experts = self.config.n_routed_experts + self.config.zero_expert_num
        hidden_TH = self.model.norm(x_TH)
        ahead = None
        if auxiliary and self.model.mtp is not None:
            ahead = layer_runner(self.recompute)(self.model.mtp, hidden_TH, embeddings_TD, cu_seqlens, layout)
        return LanguageOutput(
            hidden_TD=hidden_TH,
            ahead_TD=ahead,
            expert_counts_LE=torch.stack([expert_counts(routing.expert_TK, experts) for routing in routings]),
            balance_loss=balance,
            z_loss=z_loss,
        )

    def _check_rows(self, embeddings_TD: Tensor, cu_seqlens: Sequence[int], positions_T: Tensor) -> None:
        rows, width = embeddings_TD.shape[0], self.config.hidden_size
        if embeddings_TD.shape != (rows, width):
            raise ValueError(
                f"embeddings_TD has shape {list(embeddings_TD.shape)}, yet the model's hidden_size is {width}; give "
                f"packed rows [T, {width}]"
            )
        if len(cu_seqlens) == 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != rows:
            ends = f"runs from {cu_seqlens[0]} to {cu_seqlens[-1]}" if len(cu_seqlens) else "is empty"
            raise ValueError(
                f"cu_seqlens {ends}, yet there are {rows} rows; it must be 0 and the running sums of the "
                "sequence lengths"
            )
        for place, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            if end < start:
                raise ValueError(f"cu_seqlens falls from {start} to {end} at place {place + 1}; a length is at least 0")
        if positions_T.shape != (rows,):
            raise ValueError(
                f"positions_T has shape {list(positions_T.shape)}, yet there are {rows} rows; give one to each"
            )
        # One sum sees every bad value; a GPU is not asked, for that would wait for it (the step's norm tells there).
        if not embeddings_TD.is_cuda and not math.isfinite(float(embeddings_TD.detach().sum(dtype=torch.float32))):
            bad_T = (~embeddings_TD.detach().isfinite()).any(dim=1).nonzero().flatten()
            if len(bad_T):
                raise ValueError(
                    f"embeddings_TD holds values that are not finite in {len(bad_T)} rows, first row {int(bad_T[0])}; "
                    "look at the media features or the weights that made them"
                )

    def _run_layers(self, x_TH: Tensor, layout: PackedLayout) -> tuple[Tensor, list[Routing]]:
        """All layers, before the final norm."""
        routings = []
        run = layer_runner(self.recompute)
        for layer in self.model.layers:
            x_TH, routing = run(layer, x_TH, layout)
            routings.append(routing)
        return x_TH, routings

    @property
    def text_head(self) -> Tensor:
        """[V, H]: the text head's matrix, the embedding's own where they are tied."""
        head: nn.Embedding | nn.Linear = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight

    def audio_head(self, codebook: int) -> Tensor:
        """[codec vocabulary, H]: matrix of the head of codebook 0 (semantic) or 1..3 (acoustic, one step later)."""
        return self.audio_heads[codebook].get_parameter("weight")

    def text_logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return F.linear(hidden_RH, self.text_head)

    def audio_logits(self, hidden_RH: Tensor, codebook: int) -> Tensor:
        """[R, H] -> [R, codec vocabulary]."""
        return F.linear(hidden_RH, self.audio_head(codebook))

    def logits(self, input_ids: Tensor) -> Tensor:
        """Text logits of plain text sequences.

        Args:
            input_ids: [B, T] int64.
        Returns:
            [B, T, V].
        """
        batch, length = input_ids.shape
        cu_seqlens = [i * length for i in range(batch + 1)]
        positions = torch.arange(length, device=input_ids.device).repeat(batch)
        rows = self.model.embed_tokens(input_ids.flatten())
        out = self(rows, cu_seqlens, positions, auxiliary=False)
        return self.text_logits(out.hidden_TD).unflatten(0, (batch, length))

    @torch.no_grad()
    def update_expert_bias(self, expert_counts_LE: Tensor, rate: float) -> None:
        """Move the routers' selection bias towards ``target_ffn_experts`` FFN experts per token, evenly loaded.

        Args:
            expert_counts_LE: [layers, N + Z] assignments of the whole step, all ranks summed.
            rate: mu, usually 1e-3.
        Source: networks.md section 4, bias controller: db_i = mu (K_e/(K N) - T_i/(K T_all)), FFN experts only.
        """
        config = self.config
        ffn, k = config.n_routed_experts, config.moe_topk
        for layer, counts_E in zip(self.model.layers, expert_counts_LE, strict=True):
            assignments = counts_E.sum().clamp_min(1).float()
            step_N = config.target_ffn_experts / (k * ffn) - counts_E[:ffn].float() / assignments
            bias_E = layer.get_submodule("mlp.router").get_buffer("e_score_correction_bias")
            bias_E[:ffn] += rate * step_N

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read ``config.json`` and the safetensors of a folder in the released layout.

        Raises:
            CheckpointError: missing files; a tensor missing, foreign or of another shape (named, with both shapes).
        """
        config, dtype = weights.read_config(Path(folder)), weights.read_dtype(Path(folder))
        # On the meta device first: the only memory ever taken is that of the weights themselves.
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device="cpu")
        weights.load_language(model, config, Path(folder))
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Write ``config.json`` and safetensors in the released layout, with an index when sharded."""
        config = self.config.model_copy(update={"rope_theta": float(self.rope_base)})
        weights.save_language(self, config, Path(folder), max_shard_bytes)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return Linear(inputs, outputs, bias=False)
