"""The language worker: packed rows and features in, loss terms and the gradient of every feature slot out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.worker import NetworkWorker, Rank
from omni_ray.bridge.chunk import join, split
from omni_ray.bridge.modality_bridge import place, take_back
from omni_ray.config.curriculum import LossWeights
from omni_ray.config.recipe import Recipe
from omni_ray.data.chat import fill_codec_rows
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.engine import Engine
from omni_ray.inference.requests import Generation, GenerationRequest
from omni_ray.inference.rows import Vocabulary
from omni_ray.models.llm import LanguageModel, LanguageOutput
from omni_ray.training.gap_measure import TEXT_TERMS
from omni_ray.training.loss import TERMS, ahead_objective, auxiliary, objective, term_scales
from omni_ray.training.optimizer import rates
from omni_ray.types.batch import EmbeddingBatch, ItemRoute, OmniBatch
from omni_ray.types.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a micro-batch must know of its step."""

    counts: Mapping[str, int]
    """Global rows per loss term."""
    items: tuple[ItemRoute, ...]
    """Routes of this micro-batch's items."""
    targets: frozenset[int]
    """Speech items that are spoken by the model and carry loss."""


class LanguageWorker(NetworkWorker):
    """Owns the language backbone."""

    network_name = "language"
    network: LanguageModel

    def __init__(self, recipe: Recipe, rank: Rank) -> None:
        super().__init__(recipe, rank)
        self._sums = torch.zeros(len(TERMS), dtype=torch.float64)
        self._expert_counts: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, list[tuple[EmbeddingBatch, Tensor]]]] = {}

    def forget_step(self) -> None:
        """Forget gradients, terms, activations and statistics of an unfinished step."""
        super().forget_step()
        self._kept = {}
        self._sums = torch.zeros_like(self._sums)
        self._expert_counts = None

    def build(self, folder: Path | None = None) -> None:
        """Make the backbone, which keeps or makes again its activations as the recipe says."""
        super().build(folder)
        self.network.recompute = self.recipe.pools.language.recompute

    def forward(
        self,
        micro_batch: int,
        batch: OmniBatch,
        context: StepContext,
        features: Mapping[Modality, Sequence[EmbeddingBatch]],
        wanted: Sequence[Modality],
    ) -> Tensor:
        """Loss of one micro-batch; its graph is kept for :meth:`backward`.

        Args:
            micro_batch: Its number in the step.  batch: Packed rows, codec rows still empty.
            context: Counts and routes.  features: What each encoder rank sent, in memory that is this worker's own.
            wanted: Modalities whose encoders train; the others get no gradient.
        Returns:
            This micro-batch's share of the step's loss, a scalar.
        """
        batch = on_device(fill_speech(batch, context, features.get(Modality.SPEECH, ())), self.device)
        leaves: list[tuple[EmbeddingBatch, Tensor]] = []
        placed: list[EmbeddingBatch] = []
        for modality in (Modality.VISION, Modality.AUDIO):
            for arrived in features.get(modality, ()):
                arrived.values_ID.requires_grad_(modality in wanted)
                placed.append(arrived)
                if modality in wanted:
                    leaves.append((arrived, arrived.values_ID))
        loss, output = self._loss(batch, context, placed)
        if self.live:
            seen = output.expert_counts_LE
            self._expert_counts = seen if self._expert_counts is None else self._expert_counts + seen
        self._kept[micro_batch] = (loss, leaves)
        return loss.detach()

    def backward(self, micro_batch: int) -> list[EmbeddingBatch]:
        """Add this micro-batch's term to the gradient.

        Returns:
            The gradient of every wanted feature batch, in the order in which :meth:`forward` was given them.
        """
        loss, leaves = self._kept.pop(micro_batch)
        if loss.requires_grad:
            self.optimizer.backward(loss)
        self.keep_term(micro_batch)
        return [take_back(_gradient(values_ID), arrived) for arrived, values_ID in leaves]

    @torch.no_grad()
    def validate(
        self, payload: tuple[OmniBatch, StepContext], features: Sequence[Sequence[Any]], codes: Sequence[Any]
    ) -> tuple[float, int]:
        """Cross-entropy of the text head on a validation batch; statistics and gradients stay as they are.

        Args:
            payload: Packed rows, and their items.  features: Rows [n, D] of every vision item, then of every audio
                item.  codes: [N, 4] of every speech item.
        Returns:
            (sum over the rows with a text target, pads beside codec rows left out; number of those rows).
        """
        batch, context = payload
        speech = given(context.items, Modality.SPEECH, codes)
        batch = on_device(fill_speech(batch, context, [speech] if speech.item_ids else []), self.device)
        kinds = (Modality.VISION, Modality.AUDIO)
        placed = [given(context.items, kind, rows) for kind, rows in zip(kinds, features, strict=True)]
        rows_TD = place(self.network.embed_rows(batch.ids_T5), placed, {item.id: item for item in context.items})
        rope_base = self.stage.rope_base if self.stage is not None else None
        output = self.network(rows_TD, batch.cu_seqlens, batch.positions, rope_base=rope_base)
        _, sums = objective(self.network, output.hidden_TD, batch, term_scales(LossWeights(), context.counts))
        total = sum(float(sums[TERMS.index(term)]) for term in TEXT_TERMS)
        return total, sum(context.counts.get(term, 0) for term in TEXT_TERMS)

    def _loss(
        self, batch: OmniBatch, context: StepContext, placed: Sequence[EmbeddingBatch]
    ) -> tuple[Tensor, LanguageOutput]:
        stage = self.stage
        assert stage is not None
        rows_TD = self.network.embed_rows(batch.ids_T5)
        rows_TD = place(rows_TD, placed, {item.id: item for item in context.items})
        output = self.network(rows_TD, batch.cu_seqlens, batch.positions, rope_base=stage.rope_base)
        scales = term_scales(stage.loss, context.counts)
        loss, sums = objective(self.network, output.hidden_TD, batch, scales)
        self._sums += sums
        loss = loss + auxiliary(output, stage.loss, context.counts)
        return loss + ahead_objective(self.network, output.ahead_TD, batch, scales, stage.loss.mtp), output

    def build_engine(self, tokenizer: Tokenizer) -> None:
        """Make ready to answer prompts, after :meth:`build`; training does without."""
        codec = self.recipe.networks.codec if self.network.config.num_codebooks else None
        self.engine = Engine(self.network, Vocabulary.of(tokenizer, codec))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answer prompts together; an answer does not depend on its neighbours."""
        return self.engine.generate(requests)

    def take_statistics(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy sums [8] by term and expert counts [layers, experts] of this rank since the last call."""
        sums, counts = self._sums, self._expert_counts
        self._sums, self._expert_counts = torch.zeros_like(sums), None
        config = self.network.config
        if counts is None:
            experts = config.n_routed_experts + config.zero_expert_num
            counts = torch.zeros(config.num_layers, experts, dtype=torch.int64)
        return sums, counts

    def balance_experts(self, step: int, counts: Sequence[Tensor]) -> None:
        """Move the routers' bias by the whole step's expert counts, all ranks summed; after the optimizer step."""
        if self.live:
            stage, inside = self.recipe.stage_at(step)
            share = rates(stage.lr, inside, stage.steps)["language"] / stage.lr.peak
            total = torch.stack(list(counts)).sum(dim=0).to(self.device)
            self.network.update_expert_bias(total, self.recipe.optimizer.expert_bias_rate * share)


def fill_speech(batch: OmniBatch, context: StepContext, codes: Sequence[EmbeddingBatch]) -> OmniBatch:
    """Write codec ids into the rows that the plan keeps for them (delay of one, networks.md section 3.1)."""
    routes = {item.id: item for item in context.items}
    ids_T5, labels_T5 = batch.ids_T5.clone(), batch.labels_T5.clone()
    for part in codes:
        pieces = torch.split(part.values_ID, list(part.lengths))
        for item_id, codes_N4 in zip(part.item_ids, pieces, strict=True):
            target = item_id in context.targets
            fill_codec_rows(ids_T5, labels_T5, routes[item_id].offset, codes_N4, target=target)
    return dataclasses.replace(batch, ids_T5=ids_T5, labels_T5=labels_T5)


def on_device(batch: OmniBatch, device: torch.device) -> OmniBatch:
    """The batch with its tensors on ``device``."""
    return dataclasses.replace(
        batch,
        ids_T5=batch.ids_T5.to(device),
        labels_T5=batch.labels_T5.to(device),
        loss_kind_T=batch.loss_kind_T.to(device),
        positions=batch.positions.to(device),
    )


def given(items: Sequence[ItemRoute], modality: Modality, rows: Sequence[Any]) -> EmbeddingBatch:
    """Rows per item of one modality, in item order, as a batch of the bridge."""
    tensors = [part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) for part in rows]
    return EmbeddingBatch(
        values_ID=torch.cat(tensors) if tensors else torch.zeros(0, 0),
        item_ids=tuple(item.id for item in items if item.modality == modality),
        lengths=tuple(len(part) for part in tensors),
    )


def chunked(batches: Sequence[EmbeddingBatch], num_chunks: int) -> list[EmbeddingBatch]:
    """Gradients as they travel back: joined, then cut into ``num_chunks`` pieces."""
    return split(join(batches), num_chunks)


def _gradient(values_ID: Tensor) -> Tensor:
    return values_ID.grad if values_ID.grad is not None else torch.zeros_like(values_ID)
