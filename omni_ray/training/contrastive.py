"""Contrastive pretraining of the vision encoder: text tower, heads and losses (networks.md section 1, pretraining)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_ray.config.model import VisionConfig
from omni_ray.models.projector import Grid
from omni_ray.models.vision_encoder import Block, VisionEncoder, pack_grids

# B pictures, U different captions, E joint embedding size, D hidden size


class TextTower(nn.Module):
    """Word embedding and one transformer block, mean-pooled; captions of any lengths are packed, not padded."""

    def __init__(self, words: Sequence[str], config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.ids = {word: index for index, word in enumerate(words)}
        self.embedding = nn.Embedding(len(words), config.hidden_size)
        self.block = Block(config)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Pooled features [U, D] of captions made of known words.

        Raises:
            KeyError: a word outside the vocabulary.
        """
        ids = [[self.ids[word] for word in caption.split()] for caption in captions]
        config, weight = self.config, self.embedding.weight
        x_PD = self.embedding(torch.tensor([i for caption in ids for i in caption], device=weight.device))
        grids: list[Grid] = [(1, 1, len(caption)) for caption in ids]
        packed = pack_grids(grids, config.hidden_size // config.num_heads, config.rope_base, weight.device)
        if packed.order_R is not None:
            x_PD = x_PD[packed.order_R]
        x_PD = self.block(x_PD, packed)
        if packed.order_R is not None:
            x_PD = x_PD[torch.argsort(packed.order_R)]
        return mean_pool(x_PD, [len(caption) for caption in ids])


def mean_pool(x_PD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean of each item's rows: [P, D] to [items, D]."""
    if len(set(lengths)) == 1:
        return x_PD.view(len(lengths), lengths[0], -1).mean(dim=1)
    return torch.stack([rows.mean(dim=0) for rows in x_PD.split(list(lengths))])


def pool_columns(x_PD: Tensor, grids: Sequence[Grid], regions: int) -> Tensor:
    """Mean of each of ``regions`` equal column ranges of equal pictures: [P, D] to [pictures * regions, D].

    Raises:
        ValueError: pictures differ in size, or their columns cannot be divided.
    """
    frames, height, width = grids[0]
    if len(set(grids)) > 1 or width % regions:
        raise ValueError(f"pictures of {sorted(set(grids))} patches cannot be pooled in {regions} equal column ranges")
    cells = x_PD.view(len(grids), frames * height, regions, width // regions, -1)
    return cells.mean(dim=(1, 3)).flatten(0, 1)


class ContrastiveModel(nn.Module):
    """A vision encoder under training beside a text tower, with one linear head each, temperature and bias."""

    def __init__(
        self,
        encoder: VisionEncoder,
        words: Sequence[str],
        *,
        bias: float = -10.0,
        teacher_size: int = 0,
        seed: int = 0,
    ) -> None:
        """Wrap ``encoder``.

        Args:
            bias: First logit of every pair. -10 suits batches of thousands with one positive each (SigLIP); with few
                captions many pairs are positive, and about -3 trains.
            teacher_size: Features of a teacher to distil from, 0 for none.
        """
        super().__init__()
        config = encoder.config
        size = config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.encoder = encoder
            self.text = TextTower(words, config)
            self.image_norm = nn.RMSNorm(size, eps=config.norm_eps)
            self.image_head = nn.Linear(size, size)
            self.text_head = nn.Linear(size, size)
            self.teacher_head = nn.Linear(size, teacher_size) if teacher_size else None
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def pooled(self, patches_PC: Tensor, grids: Sequence[Grid], regions: int = 1) -> Tensor:
        """Mean-pooled, normed ViT features [B, D] of packed items; of ``regions`` column ranges of each."""
        features_PD = self.encoder.vit_features(patches_PC, grids)
        if regions > 1:
            pooled_BD = pool_columns(features_PD, grids, regions)
        else:
            pooled_BD = mean_pool(features_PD, [t * h * w for t, h, w in grids])
        normed: Tensor = self.image_norm(pooled_BD)
        return normed

    def image_embedding(self, pooled_BD: Tensor) -> Tensor:
        """Unit vectors [B, E]."""
        return F.normalize(self.image_head(pooled_BD), dim=-1)

    def text_embedding(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [U, E]."""
        return F.normalize(self.text_head(self.text(captions)), dim=-1)

    def loss(self, pooled_BD: Tensor, captions: Sequence[str]) -> Tensor:
        """Sigmoid contrastive loss of B pictures and their B captions; equal captions are all positives."""
        unique = list(dict.fromkeys(captions))
        column = {caption: index for index, caption in enumerate(unique)}
        own_B = torch.tensor([column[caption] for caption in captions], device=pooled_BD.device)
        cosine_BU = self.image_embedding(pooled_BD) @ self.text_embedding(unique).T
        return sigmoid_loss(self.log_temperature.exp() * cosine_BU + self.bias, own_B)


def sigmoid_loss(logits_BU: Tensor, own_B: Tensor) -> Tensor:
    """``-(1/B) sum_ij log sigmoid(z_ij logit_ij)`` over all B x B pairs, z = +1 for equal captions and -1 otherwise.

    Args:
        logits_BU: Pictures against the *different* captions of the batch; a caption's column stands for all its
            copies and is counted as often.
        own_B: Column of each picture's caption.
    Source: SigLIP (pairwise sigmoid loss); UniViTAR, which the report names as this encoder's family.
    """
    copies_U = torch.bincount(own_B, minlength=logits_BU.shape[1]).to(logits_BU.dtype)
    sign_BU = 2.0 * F.one_hot(own_B, logits_BU.shape[1]).to(logits_BU.dtype) - 1.0
    return -(F.logsigmoid(sign_BU * logits_BU) @ copies_U).mean()


def distillation_loss(student_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """``1 - cos(student, teacher)``, averaged; the teacher takes no gradient."""
    return 1.0 - F.cosine_similarity(student_BF, teacher_BF.detach(), dim=-1).mean()


def distillation_weight(step: int, steps: int, share: float = 0.4) -> float:
    """Falls linearly from 1 to 0 over the first ``share`` of the steps (the report lowers it in later stages)."""
    return max(0.0, 1.0 - step / max(1.0, share * steps))
