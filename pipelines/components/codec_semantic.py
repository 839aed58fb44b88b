"""The codec's semantic branch: CTC on spelling, then k-means over its last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.codec import Codec
from omni_ray.models.fbank import spec_augment
from omni_ray.types.errors import ConfigError
from pipelines.components.codec_material import Clip, by_kind

UNITS = "-abcdefghijklmnopqrstuvwxyz|"
"""CTC units: the blank (id 0), letters, and the gap between words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticRecipe:
    """How the semantic branch is trained."""

    steps: int = 900
    """Optimiser steps: the assistant, synthetic voices and people take turns, so that short clips are not padded."""
    clips: int = 24
    """Clips of one kind a step."""
    lr: float = 3e-3
    """Peak of the one-cycle schedule (AdamW)."""
    gain_log: float = 1.5
    """Largest change of log energy, up or down (about 6 dB)."""
    kmeans_rounds: int = 40
    """Lloyd iterations."""
    kmeans_rows: int = 40000
    """Frames that k-means sees, evenly spread."""


def spelling(words: Sequence[str]) -> list[int]:
    """CTC targets of words; doubled letters once, since 60 ms frames leave no room for the blank between them."""
    text = "|".join(words)
    letters = [letter for place, letter in enumerate(text) if place == 0 or text[place - 1] != letter]
    return [UNITS.index(letter) for letter in letters if letter in UNITS]


def train_semantic(
    codec: Codec, clips: Sequence[Clip], recipe: SemanticRecipe, *, seed: int, log: Callable[[str], None]
) -> nn.Linear:
    """Fit the branch with CTC, then its codebook; returns the CTC head, which the codec does not keep.

    Raises:
        ConfigError: the configuration has fewer CTC units than there are letters.
    """
    config = codec.config
    if config.semantic_ctc_vocab_size < len(UNITS):
        raise ConfigError(
            f"codec.semantic_ctc_vocab_size is {config.semantic_ctc_vocab_size}; the spelling needs {len(UNITS)}"
        )
    with torch.no_grad():
        features = [codec.fbank(whole_frames(clip.input_S, config.hop)) for clip in clips]
        rows_FC = torch.cat(features)
        codec.semantic.mean_C.copy_(rows_FC.mean(dim=0))
        codec.semantic.scale_C.copy_(1.0 / rows_FC.std(dim=0).clamp_min(1e-3))
    head = nn.Linear(config.semantic_dim, config.semantic_ctc_vocab_size)
    trained = [*codec.semantic.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    chance = torch.Generator().manual_seed(seed)
    kinds = list(by_kind(clips).values())
    for step in range(recipe.steps):
        group = kinds[step % len(kinds)]
        places = [group[int(i)] for i in torch.randint(0, len(group), (recipe.clips,), generator=chance)]
        rows = [varied(features[place], recipe, chance) for place in places]
        loss = ctc_part(codec, head, rows, [spelling(clips[place].words) for place in places])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step + 1 == recipe.steps:
            log(f"semantic {step + 1}/{recipe.steps} ctc {loss.item():.3f}")
    fit_codebook(codec, features, recipe, seed=seed)
    return head


def whole_frames(wave_S: Tensor, hop: int) -> Tensor:
    """The clip with silence up to a whole number of codec frames."""
    return F.pad(wave_S, (0, -wave_S.shape[0] % hop))


def varied(fbank_FC: Tensor, recipe: SemanticRecipe, chance: torch.Generator) -> Tensor:
    """One clip's features [F, C], louder or quieter, with masks."""
    shift = (2.0 * torch.rand((), generator=chance) - 1.0) * recipe.gain_log
    return spec_augment(fbank_FC + shift, chance)


def ctc_part(codec: Codec, head: nn.Linear, features: Sequence[Tensor], targets: Sequence[list[int]]) -> Tensor:
    """Mean over clips of the CTC loss over a clip's letters; clips too short for their letters count as nothing."""
    lengths = torch.tensor([(len(rows) + 2) // 6 for rows in features])
    padded_BFC = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    missing = -(padded_BFC.shape[1] + 2) % 6
    padded_BFC = F.pad(padded_BFC, (0, 0, 0, missing))
    frames = (padded_BFC.shape[1] + 2) // 6
    keep_BN = torch.arange(frames) < lengths.unsqueeze(1)
    log_probs_NBV = head(codec.semantic(padded_BFC, keep_BN)).log_softmax(dim=-1).transpose(0, 1)
    return F.ctc_loss(
        log_probs_NBV,
        torch.tensor([unit for target in targets for unit in target]),
        lengths,
        torch.tensor([len(target) for target in targets]),
        zero_infinity=True,
    )


@torch.no_grad()
def fit_codebook(codec: Codec, features: Sequence[Tensor], recipe: SemanticRecipe, *, seed: int) -> None:
    """k-means over l2-normalised last-layer frames of the training clips."""
    codec.semantic.eval()
    rows_RD = torch.cat([F.normalize(codec.semantic(rows.unsqueeze(0))[0], dim=-1) for rows in features])
    step = max(1, rows_RD.shape[0] // recipe.kmeans_rows)
    codec.semantic.centres_KD.copy_(
        kmeans(rows_RD[::step], codec.config.semantic_codes, recipe.kmeans_rounds, seed=seed)
    )


def kmeans(rows_RD: Tensor, centres: int, rounds: int, *, seed: int) -> Tensor:
    """Lloyd's k-means from a k-means++ start; [centres, D], the same for the same seed.

    A centre that loses all its rows moves to the row farthest from its own centre.
    """
    chance = torch.Generator().manual_seed(seed)
    first = int(torch.randint(0, rows_RD.shape[0], (), generator=chance))
    chosen = [rows_RD[first]]
    nearest_R = (rows_RD - chosen[0]).square().sum(dim=-1)
    for _ in range(centres - 1):
        place = int(torch.multinomial(nearest_R.clamp_min(1e-12), 1, generator=chance))
        chosen.append(rows_RD[place])
        nearest_R = torch.minimum(nearest_R, (rows_RD - rows_RD[place]).square().sum(dim=-1))
    centres_KD = torch.stack(chosen)
    for _ in range(rounds):
        distance_RK = centres_KD.square().sum(dim=-1) - 2.0 * (rows_RD @ centres_KD.t())
        far_R, owner_R = distance_RK.min(dim=-1)
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, owner_R, rows_RD)
        counts_K = torch.bincount(owner_R, minlength=centres)
        centres_KD = sums_KD / counts_K.clamp_min(1).unsqueeze(1)
        empty_E = (counts_K == 0).nonzero()[:, 0]
        if len(empty_E):
            farthest_E = (far_R + rows_RD.square().sum(dim=-1)).topk(len(empty_E)).indices
            centres_KD[empty_E] = rows_RD[farthest_E]
    return centres_KD
