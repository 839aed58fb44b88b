"""Pretrain the tiny audio encoder with CTC on spoken words, measure it on unheard people and voices, write its card.

    python -m pipelines.components.audio --out audio-tiny --steps 3000 --seed 0

Speech comes from synthetic voices, and from people where the environment variable OMNI_RAY_REAL_DATA names a folder
with recordings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.model import AudioConfig, model_preset
from omni_ray.data.tiny_world.words import DIGITS
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.types.errors import ConfigError
from pipelines.components.audio_batches import Augmentation, SpeechBatch, SpeechBatcher
from pipelines.components.audio_material import Clip, digest, held_out_clips, training_clips, vocabulary
from pipelines.components.options import add_scale, scaled_steps

REAL_DATA_VARIABLE = "OMNI_RAY_REAL_DATA"
DEFAULT_STEPS = 3000
HOLD_OUT = "yweweler"
BLANK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioRecipe:
    """How the tiny encoder is pretrained."""

    steps: int = DEFAULT_STEPS
    """Optimiser steps."""
    human: int = 14
    """Clips of people a step (synthetic words where there are none)."""
    words: int = 20
    """Synthetic words a step."""
    sentences: int = 8
    """Synthetic sentences a step."""
    lr: float = 2.5e-3
    """Peak of the one-cycle schedule (AdamW)."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip_norm: float = 5.0
    """Largest gradient norm."""
    cmvn_batches: int = 20
    """Augmented batches that the global normalisation is measured on."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How training clips are varied."""


def train_audio(
    out: Path,
    *,
    real_data: Path | None = None,
    hold_out: str = HOLD_OUT,
    seed: int = 0,
    recipe: AudioRecipe | None = None,
    config: AudioConfig | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train from nothing, measure on held-out speech, write ``config.json``, ``model.safetensors`` and ``card.json``.

    Args:
        out: Folder to write.
        real_data: Folder with ``human-digits``; None trains on synthetic voices alone.
        hold_out: Person never heard in training.
        recipe: Fixed numbers of steps, so that equal seeds on equal machines give equal weights.

    Returns:
        The card.

    Raises:
        DataError: speech cannot be read or made.
        ConfigError: the CTC head has fewer units than the words need.
    """
    recipe = recipe or AudioRecipe()
    config = config or model_preset("tiny").audio
    clips = training_clips(real_data, hold_out)
    started = time.monotonic()
    encoder = pretrain(clips, recipe, config, seed=seed, log=log)
    minutes = (time.monotonic() - started) / 60
    figures = evaluate_audio(encoder, held_out_clips(real_data, hold_out))
    encoder.save_pretrained(out, dtype=torch.float16)
    card = make_card(clips, recipe, config, hold_out=hold_out, seed=seed, minutes=minutes, figures=figures)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def pretrain(
    clips: Sequence[Clip],
    recipe: AudioRecipe,
    config: AudioConfig,
    *,
    seed: int,
    log: Callable[[str], None] | None = None,
) -> AudioEncoder:
    """CTC over word units; the projector stays as the seed made it."""
    units = vocabulary()
    if len(units) > config.ctc_vocab_size:
        raise ConfigError(f"ctc_vocab_size is {config.ctc_vocab_size}, yet {len(units)} units are spoken; raise it")
    torch.manual_seed(seed)
    encoder = AudioEncoder(config)
    batcher = SpeechBatcher(clips, encoder.fbank, recipe.augmentation, seed)
    measure_cmvn(encoder, [draw(batcher, recipe) for _ in range(recipe.cmvn_batches)])
    trained = list(encoder.encoder.parameters())
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.15)
    encoder.train()
    for step in range(recipe.steps):
        loss = ctc_loss(encoder, draw(batcher, recipe), units)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        schedule.step()
        if log is not None and (step % 100 == 99 or step + 1 == recipe.steps):
            log(f"step {step + 1}/{recipe.steps} loss {loss.item():.3f}")
    return encoder.eval()


def draw(batcher: SpeechBatcher, recipe: AudioRecipe) -> SpeechBatch:
    """One batch of the recipe's mixture."""
    return batcher.draw(recipe.human, recipe.words, recipe.sentences)


def measure_cmvn(encoder: AudioEncoder, batches: Sequence[SpeechBatch]) -> None:
    """Global mean and deviation of every mel bin over augmented training speech."""
    frames_TM = torch.cat([frames_TM for batch in batches for frames_TM in batch.features])
    encoder.set_cmvn(frames_TM.mean(dim=0), frames_TM.std(dim=0))


def ctc_loss(encoder: AudioEncoder, batch: SpeechBatch, units: Sequence[str]) -> Tensor:
    """CTC, mean over clips; a clip too short for its words counts zero."""
    logits_RV, lengths = encoder.ctc_logits(batch.features)
    padded_BNV = torch.nn.utils.rnn.pad_sequence(list(logits_RV.split(lengths)), batch_first=True)
    targets = [[units.index(word) for word in clip.words] for clip in batch.clips]
    loss: Tensor = F.ctc_loss(
        padded_BNV.log_softmax(dim=-1).transpose(0, 1),
        torch.tensor([unit for target in targets for unit in target]),
        torch.tensor(lengths),
        torch.tensor([len(target) for target in targets]),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / len(targets)


@torch.no_grad()
def evaluate_audio(encoder: AudioEncoder, clips: dict[str, list[Clip]]) -> dict[str, dict[str, Any]]:
    """Figures on held-out speech, each with n and chance.

    ``*_digit``: the likeliest of the ten digit words; ``*_free``: greedy CTC gives exactly the words.
    """
    encoder.eval()
    figures: dict[str, dict[str, Any]] = {}
    for name, group in clips.items():
        if not group:
            continue
        logits = [encoder.ctc_logits([encoder.features(clip.wave_S)])[0].log_softmax(dim=-1) for clip in group]
        free = [greedy_words(logits_NV) == clip.words for logits_NV, clip in zip(logits, group, strict=True)]
        figures[f"{name}_free"] = _figure(free, 0.0)
        if all(len(clip.words) == 1 for clip in group):
            best = [
                likeliest(logits_NV, DIGITS) == clip.words[0] for logits_NV, clip in zip(logits, group, strict=True)
            ]
            figures[f"{name}_digit"] = _figure(best, 0.1)
    return figures


def greedy_words(logits_NV: Tensor) -> tuple[str, ...]:
    """Best unit of every row, repeats joined, blanks dropped."""
    units = vocabulary()
    best = [unit for unit, _ in groupby(logits_NV[:, : len(units)].argmax(dim=-1).tolist())]
    return tuple(units[unit] for unit in best if unit != BLANK)


def likeliest(log_probs_NV: Tensor, words: Sequence[str]) -> str:
    """The word with the greatest CTC probability of being all that is said."""
    units = vocabulary()
    count = len(words)
    losses = F.ctc_loss(
        log_probs_NV[:, None].expand(-1, count, -1),
        torch.tensor([[units.index(word)] for word in words]),
        torch.full((count,), log_probs_NV.shape[0]),
        torch.ones(count, dtype=torch.long),
        blank=BLANK,
        reduction="none",
    )
    return words[int(losses.argmin())]


def _figure(right: Sequence[bool], chance: float) -> dict[str, Any]:
    return {"value": round(sum(right) / len(right), 4), "n": len(right), "chance": chance}


def make_card(
    clips: Sequence[Clip],
    recipe: AudioRecipe,
    config: AudioConfig,
    *,
    hold_out: str,
    seed: int,
    minutes: float,
    figures: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What was trained, on what, how well: beside the weights as ``card.json``."""
    people = sorted({clip.source for clip in clips if clip.kind == "human"})
    voices = sorted({clip.source for clip in clips if clip.kind != "human"})
    held_out_voices = sorted({clip.source for clip in held_out_clips(None)["synthetic"]})
    return {
        "component": "audio encoder (streaming FSMN, tiny) with projector",
        "command": f"python -m pipelines.components.audio --out DIR --steps {recipe.steps} --seed {seed}",
        "seed": seed,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trained": {"encoder": True, "projector": False},
        "note": "The projector is as initialised by the seed; Stage 5 trains it.",
        "figures": figures,
        "ctc_units": list(vocabulary()),
        "recipe": asdict(recipe),
        "config": config.model_dump(mode="json"),
        "training_data": {"sha256": digest(clips), "people": people, "voices": voices, "count": len(clips)},
        "held_out": {
            "people": [hold_out] if people else [],
            "voices": held_out_voices,
            "combinations": "colour-digit pairs of words.pairs(held_out=True) were never spoken",
        },
        "licences": {
            "people": "Free Spoken Digit Dataset (Jakobovski and contributors): CC BY-SA 4.0",
            "voices": "eSpeak NG (GPL-3.0 program, called to make sound), hibari-tts (Apache-2.0)",
            "weights": "Apache-2.0",
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; figures as one JSON document on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.components.audio", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimiser steps (default %(default)s)")
    add_scale(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-out", default=HOLD_OUT, help="person kept for the figures (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = os.environ.get(REAL_DATA_VARIABLE)
    card = train_audio(
        options.out,
        real_data=Path(folder) if folder else None,
        hold_out=options.hold_out,
        seed=options.seed,
        recipe=AudioRecipe(steps=scaled_steps(options.steps, options.scale)),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(card["figures"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
