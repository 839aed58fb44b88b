"""The reference: a whole training step in one process, in plain torch. Every parallel form must equal it.

No pools, no bridge, no schedule: micro-batch after micro-batch, features made tile by tile, placed by plain indexing,
gradients left to autograd and added in order.  It shares the networks, the loss and AdamW with the workers; how work is
cut, moved, ordered and summed, it writes out by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.config.recipe import Recipe
from omni_ray.data.chat import fill_codec_rows
from omni_ray.data.media import patch_rows, sound_rows
from omni_ray.training.loss import TERMS, ahead_objective, auxiliary, means, objective, term_scales
from omni_ray.training.networks import POOLS, build_network
from omni_ray.training.optimizer import PoolOptimizer, rates
from omni_ray.training.prepare import PreparedStep
from omni_ray.training.process import settle_process
from omni_ray.types.batch import ItemRoute, OmniBatch
from omni_ray.types.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStep:
    """What a reference step leaves for comparison."""

    losses: dict[str, float]
    """Mean cross-entropy by term."""
    norm: float
    """Global gradient norm before clipping."""
    gradients: dict[str, dict[str, Tensor]]
    """Gradient of the step by pool and parameter, before clipping; empty unless asked for."""


class Reference:
    """All four networks in one process; ``step`` runs one training step exactly as the pools must."""

    def __init__(self, recipe: Recipe) -> None:
        settle_process(threads=1, deterministic=recipe.deterministic)
        self.recipe = recipe
        self.networks: dict[str, Any] = {name: build_network(name, recipe).eval() for name in (*POOLS, "codec")}
        self.networks["language"].recompute = recipe.pools.language.recompute
        self.optimizers = {
            name: PoolOptimizer(name, self.networks[name], recipe.optimizer, getattr(recipe.pools, name).precision)
            for name in POOLS
        }

    def step(self, prepared: PreparedStep, keep_gradients: bool = False) -> ReferenceStep:
        """One step: forward, backward, one global norm, one optimizer step, one move of the expert bias.

        Args:
            prepared: Output of ``StepBuilder.build``, with tensors.  keep_gradients: Return copies of the gradients.
        """
        plan = prepared.plan
        stage, inside = self.recipe.stage_at(plan.step)
        live = [name for name in POOLS if self.optimizers[name].set_stage(stage)]
        language = self.networks["language"]
        scales = term_scales(stage.loss, plan.counts)
        sums = torch.zeros(len(TERMS), dtype=torch.float64)
        experts: Tensor | int = 0
        for index in plan.order:
            items = [item for item in plan.items if item.micro_batch == index]
            batch = self._with_codes(prepared, prepared.batches[index], items)
            tiles = self._features(prepared, items)
            rows_TD = language.embed_rows(batch.ids_T5)
            rows_TD = _placed(rows_TD, tiles)
            output = language(rows_TD, batch.cu_seqlens, batch.positions, rope_base=stage.rope_base)
            loss, part = objective(language, output.hidden_TD, batch, scales)
            loss = loss + auxiliary(output, stage.loss, plan.counts)
            loss = loss + ahead_objective(language, output.ahead_TD, batch, scales, stage.loss.mtp)
            if loss.requires_grad:
                loss.backward()
                self.optimizers["language"].close_term()
            sums += part
            experts = experts + output.expert_counts_LE
            for members, rows_ID, leaf_ID in tiles:
                if rows_ID.requires_grad:
                    rows_ID.backward(leaf_ID.grad)
                    self.optimizers[members[0].modality.value].close_term()
        norms = [self.optimizers[name].norm_squared() for name in live]
        gradients = {name: _copies(self.optimizers[name]) for name in live} if keep_gradients else {}
        share = rates(stage.lr, inside, stage.steps)
        made = [self.optimizers[name].apply(norms, share)[1] for name in live]
        if "language" in live and all(made):
            rate = self.recipe.optimizer.expert_bias_rate * share["language"] / stage.lr.peak
            language.update_expert_bias(experts, rate)
        norm = math.sqrt(sum(norms))
        return ReferenceStep(losses=means(sums, plan.counts), norm=norm, gradients=gradients)

    def save(self, folder: Path) -> None:
        """Write the trained networks under ``folder/model``, as a checkpoint holds them."""
        for name in POOLS:
            trained: Any = self.optimizers[name].trained()
            trained.save_pretrained(folder / "model" / name)

    def _features(self, prepared: PreparedStep, items: list[ItemRoute]) -> list[tuple[list[ItemRoute], Tensor, Tensor]]:
        """Per tile: its items, the encoder's rows, and the leaf that the language model sees."""
        out = []
        for tile in sorted({item.tile for item in items if item.modality != Modality.SPEECH}):
            members = [item for item in items if item.tile == tile]
            network: Any = self.networks[members[0].modality.value]
            trains = any(p.requires_grad for p in network.parameters())
            media = [prepared.media[item.id] for item in members]
            with torch.set_grad_enabled(trains):
                if members[0].modality == Modality.VISION:
                    patches, grids = patch_rows(media, network.config)
                    rows_ID = network(torch.from_numpy(patches), grids)
                else:
                    rows_ID, _ = sound_rows(network, media)
            out.append((members, rows_ID, rows_ID.detach().clone().requires_grad_(trains)))
        return out

    def _with_codes(self, prepared: PreparedStep, batch: OmniBatch, items: list[ItemRoute]) -> OmniBatch:
        ids_T5, labels_T5 = batch.ids_T5.clone(), batch.labels_T5.clone()
        for item in items:
            if item.modality == Modality.SPEECH:
                codes_N4 = self.networks["codec"].encode(torch.from_numpy(prepared.media[item.id].copy()), 16000)
                fill_codec_rows(ids_T5, labels_T5, item.offset, codes_N4, target=item.id in prepared.targets)
        return OmniBatch(
            ids_T5=ids_T5,
            cu_seqlens=batch.cu_seqlens,
            labels_T5=labels_T5,
            loss_kind_T=batch.loss_kind_T,
            positions=batch.positions,
        )


def _placed(rows_TD: Tensor, tiles: list[tuple[list[ItemRoute], Tensor, Tensor]]) -> Tensor:
    rows_TD = rows_TD.clone()
    for members, _, leaf_ID in tiles:
        start = 0
        for item in members:
            rows_TD[item.offset : item.offset + item.length] = leaf_ID[start : start + item.length]
            start += item.length
    return rows_TD


def _copies(optimizer: PoolOptimizer) -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in optimizer.gradients().items()}
