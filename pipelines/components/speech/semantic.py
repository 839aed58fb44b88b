"""The semantic branch on many workers: BEST-RQ, CTC on spelling, k-means over its last layer.

Legend: B clips, F fbank frames (10 ms), C mel bins, N codec frames (60 ms), D width, K centres, R rows, V CTC units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.speech_training import CtcStage, KmeansStage, PretrainStage
from omni_ray.models.codec import Codec
from omni_ray.training.best_rq import STACK, RandomTargets, hide, mask_frames, masked_loss
from omni_ray.types.errors import DataError
from pipelines.components.codec_material import Clip, by_kind
from pipelines.components.codec_semantic import SemanticRecipe, ctc_part, kmeans, spelling, varied, whole_frames
from pipelines.components.speech.group import Group, own_parts, summed_in_order
from pipelines.components.speech.loop import TOTAL, one_cycle

BETAS, WEIGHT_DECAY, RISE = (0.9, 0.98), 0.01, 0.1
KMEANS_PARTS = 4
"""Shares of the clips whose sums are added in order."""
FAR_ROWS = 64
"""Rows of a part that are offered to centres without any."""


def clip_features(codec: Codec, clips: Sequence[Clip]) -> list[Tensor]:
    """Log-mel frames of every clip, and the branch's normalisation set from them."""
    with torch.no_grad():
        features = [codec.fbank(whole_frames(clip.input_S, codec.config.hop)) for clip in clips]
        rows_FC = torch.cat(features)
        codec.semantic.mean_C.copy_(rows_FC.mean(dim=0))
        codec.semantic.scale_C.copy_(1.0 / rows_FC.std(dim=0).clamp_min(1e-3))
    return features


class SemanticObjective:
    """What both semantic phases share: clips of one kind a step, the branch and a head that is thrown away."""

    def __init__(self, codec: Codec, clips: Sequence[Clip], stage: PretrainStage | CtcStage, outputs: int) -> None:
        self.codec, self.clips, self.config = codec, clips, stage.train
        self.features = clip_features(codec, clips)
        self.head = nn.Linear(codec.config.semantic_dim, outputs)
        self.kinds = list(by_kind(clips).values())
        self.modules: dict[str, nn.Module] = {"codec": codec, "head": self.head}
        self.players = {"generator": [*codec.semantic.parameters(), *self.head.parameters()]}

    def turns(self, step: int) -> tuple[str, ...]:
        """One player."""
        return ("generator",)

    def optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, Any]]:
        """AdamW, one cycle."""
        groups = [{"params": self.players["generator"], "lr": self.config.lr}]
        return {"generator": one_cycle(groups, self.config, betas=BETAS, weight_decay=WEIGHT_DECAY, rise=RISE)}

    def drawn(self, chance: torch.Generator) -> list[int]:
        """Clips of one kind, so that short ones are not padded to long ones."""
        group = self.kinds[int(torch.randint(0, len(self.kinds), (), generator=chance))]
        return [group[int(i)] for i in torch.randint(0, len(group), (self.config.batch,), generator=chance)]

    def part_of(self, rows: Any, part: int) -> Any:
        """The rows (a list or a tensor) of one part."""
        size = self.config.batch // self.config.parts
        return rows[part * size : (part + 1) * size]

    def finish(self) -> None:
        """Nothing follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masked:
    """A batch of BEST-RQ."""

    fbank_BFC: Tensor
    """With noise in the hidden stretches."""
    keep_BN: Tensor
    hidden_BN: Tensor
    codes_BN: Tensor


class Pretraining(SemanticObjective):
    """BEST-RQ: codes of hidden frames from what stands around them."""

    def __init__(self, codec: Codec, clips: Sequence[Clip], stage: PretrainStage, *, seed: int) -> None:
        super().__init__(codec, clips, stage, stage.targets.codes)
        self.stage = stage
        self.targets = RandomTargets(codec.config.num_mels, stage.targets, seed=seed)

    def draw(self, chance: torch.Generator) -> _Masked:
        """Padded clips with their masks and targets."""
        semantic = self.codec.semantic
        rows = [self.features[place] for place in self.drawn(chance)]
        fbank_BFC, keep_BN = padded(rows)
        codes_BN = self.targets((fbank_BFC - semantic.mean_C) * semantic.scale_C)
        hidden_BN = mask_frames(keep_BN, self.stage.targets, chance)
        noisy_BFC = hide(fbank_BFC, hidden_BN, semantic.mean_C, semantic.scale_C, chance)
        return _Masked(fbank_BFC=noisy_BFC, keep_BN=keep_BN, hidden_BN=hidden_BN, codes_BN=codes_BN)

    def losses(self, player: str, batch: _Masked, part: int, step: int) -> dict[str, Tensor]:
        """Cross-entropy of hidden frames, and how many of them are guessed."""
        keep_BN, hidden_BN, codes_BN = (
            self.part_of(rows, part) for rows in (batch.keep_BN, batch.hidden_BN, batch.codes_BN)
        )
        logits_BNK = self.head(self.codec.semantic(self.part_of(batch.fbank_BFC, part), keep_BN))
        in_all = int(batch.hidden_BN.sum())
        right = (logits_BNK.argmax(dim=-1) == codes_BN)[hidden_BN].sum() / max(1, in_all)
        return {TOTAL: masked_loss(logits_BNK, codes_BN, hidden_BN, in_all), "guessed": right.float()}


class Ctc(SemanticObjective):
    """CTC on the letters of what is said."""

    def __init__(self, codec: Codec, clips: Sequence[Clip], stage: CtcStage) -> None:
        spoken = [clip for clip in clips if clip.words]
        if not spoken:
            raise DataError(
                "no recording has its words beside it, and CTC needs them: put NAME.txt beside NAME.wav, "
                "or set ctc.train.steps=0"
            )
        super().__init__(codec, spoken, stage, codec.config.semantic_ctc_vocab_size)
        self.recipe = SemanticRecipe(gain_log=stage.gain_log)

    def draw(self, chance: torch.Generator) -> list[tuple[Tensor, list[int]]]:
        """Varied features and spelling of every clip."""
        places = self.drawn(chance)
        return [(varied(self.features[p], self.recipe, chance), spelling(self.clips[p].words)) for p in places]

    def losses(self, player: str, batch: list[tuple[Tensor, list[int]]], part: int, step: int) -> dict[str, Tensor]:
        """Mean over clips of CTC over the letters of a clip."""
        rows = self.part_of(batch, part)
        loss = ctc_part(self.codec, self.head, [row[0] for row in rows], [row[1] for row in rows])
        return {TOTAL: loss / self.config.parts}


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips [B, F, C] of one length (whole codec frames), and which codec frames are real [B, N]."""
    lengths = torch.tensor([(len(row) + 2) // STACK for row in rows])
    padded_BFC = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    padded_BFC = F.pad(padded_BFC, (0, 0, 0, -(padded_BFC.shape[1] + 2) % STACK))
    frames = (padded_BFC.shape[1] + 2) // STACK
    return padded_BFC, torch.arange(frames) < lengths.unsqueeze(1)


@torch.no_grad()
def shared_kmeans(codec: Codec, clips: Sequence[Clip], stage: KmeansStage, group: Group, *, seed: int) -> float:
    """Set the semantic codebook; every worker encodes and counts its share of the clips.

    Returns:
        Mean squared distance of a frame to its centre after the last round.
    Raises:
        ConfigError: workers that do not divide the four parts.
    """
    parts = [_part_rows(codec, clips[part::KMEANS_PARTS]) for part in own_parts(KMEANS_PARTS, group)]
    total = sum(group.gather_objects(sum(map(len, parts))))
    every = max(1, total // stage.rows)
    first_RD = torch.cat([rows for got in group.gather_objects([rows[::every] for rows in parts]) for rows in got])
    centres_KD = kmeans(first_RD, codec.config.semantic_codes, 0, seed=seed)
    far = torch.zeros(())
    for _ in range(stage.rounds):
        counted = [_count(rows, centres_KD) for rows in parts]
        sums = summed_in_order(torch.stack([torch.cat([c[0].flatten(), c[1]]) for c in counted]), group)
        far = summed_in_order(torch.stack([c[2].reshape(1) for c in counted]), group)[0]
        sums_KD, count_K = sums[: centres_KD.numel()].view_as(centres_KD), sums[centres_KD.numel() :]
        centres_KD = sums_KD / count_K.clamp_min(1.0).unsqueeze(1)
        offered = [row for rows in group.gather(torch.stack([c[3] for c in counted])) for row in rows]
        _fill_empty(centres_KD, count_K, torch.cat(offered))
    codec.semantic.centres_KD.copy_(centres_KD)
    return float(far) / max(1, total)


def _part_rows(codec: Codec, clips: Sequence[Clip]) -> Tensor:
    width = codec.config.semantic_dim
    waves = [whole_frames(clip.input_S, codec.config.hop) for clip in clips]
    rows = [F.normalize(codec.semantic(codec.fbank(wave_S).unsqueeze(0))[0], dim=-1) for wave_S in waves]
    return torch.cat(rows) if rows else torch.zeros(0, width)


def _count(rows_RD: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums [K, D], counts [K], the summed distance, and the farthest rows [FAR_ROWS, 1 + D] with it in front."""
    squares_R = rows_RD.square().sum(dim=-1)
    distance_RK = centres_KD.square().sum(dim=-1) - 2.0 * (rows_RD @ centres_KD.t())
    near_R, owner_R = distance_RK.min(dim=-1) if len(rows_RD) else (squares_R, squares_R.long())
    far_R = (near_R + squares_R).clamp_min(0.0)
    sums_KD = torch.zeros_like(centres_KD).index_add_(0, owner_R, rows_RD)
    count_K = torch.bincount(owner_R, minlength=len(centres_KD)).to(centres_KD.dtype)
    offered = torch.full((FAR_ROWS, 1 + rows_RD.shape[1]), -1.0)
    top = far_R.topk(min(FAR_ROWS, len(far_R)))
    offered[: len(top.indices)] = torch.cat([top.values.unsqueeze(1), rows_RD[top.indices]], dim=1)
    return sums_KD, count_K, far_R.sum(), offered


def _fill_empty(centres_KD: Tensor, count_K: Tensor, offered_RD: Tensor) -> None:
    """A centre without rows moves to the farthest row that is still free."""
    empty_E = (count_K == 0).nonzero()[:, 0]
    usable_RD = offered_RD[offered_RD[:, 0] >= 0]
    taken = min(len(empty_E), len(usable_RD))
    if taken:
        farthest = usable_RD[:, 0].topk(taken).indices
        centres_KD[empty_E[:taken]] = usable_RD[farthest, 1:]
