"""Pretrain the tiny vision encoder on painted digits, measure it on held-out ones, and write it with its card.

    python -m pipelines.components.vision --out vision-tiny --steps 4500 --seed 0

Digits come from scikit-learn, and from MNIST where the environment variable OMNI_RAY_REAL_DATA names a folder with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.config.model import VisionConfig, model_preset
from omni_ray.data.tiny_world.pictures import Glyphs, load_glyphs
from omni_ray.data.tiny_world.words import DIGITS, all_words
from omni_ray.models.vision_encoder import VisionEncoder
from omni_ray.training.contrastive import ContrastiveModel, distillation_loss, distillation_weight
from omni_ray.training.muon import Muon
from omni_ray.training.vision_teacher import ConvTeacher, train_teacher
from omni_ray.types.errors import OmniError
from pipelines.components.options import add_scale, scaled_steps
from pipelines.components.vision_batches import MOVING_BOX, PICTURE_BOX, BatchPainter, PictureBatch, patchify
from pipelines.components.vision_figures import evaluate_vision

REAL_DATA_VARIABLE = "OMNI_RAY_REAL_DATA"
DEFAULT_STEPS = 4500


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionRecipe:
    """How the tiny encoder is pretrained; the reasons are in networks.md section 1 and the card's figures."""

    steps: int = DEFAULT_STEPS
    """Optimiser steps of all stages."""
    batch: int = 64
    """Pictures or frame pairs a step."""
    native_from: float = 1.0
    """Share of the steps after which pictures of several digits join (stage V2, native resolution); 1 for never, as
    the shipped weights were trained."""
    motion_from: float = 0.5
    """Share after which every second batch is of frame pairs, and some still pictures show small digits (stage V4)."""
    muon_lr: float = 0.02
    """Muon on matrices."""
    adam_lr: float = 2e-3
    """AdamW on the rest; ten times as much on temperature and bias."""
    weight_decay: float = 0.01
    """Of both optimisers."""
    warmup: int = 30
    """Steps of linear warm-up; then linear decay to ``final_lr``."""
    final_lr: float = 0.02
    """Last learning rate as a share of the first."""
    bias: float = -3.0
    """First bias of the sigmoid loss: a tenth of the pairs in a batch are positive here."""
    teacher_steps: int = 0
    """Steps of the convolutional teacher (400 give it 0.95 and more); 0 trains without feature distillation."""
    distil_share: float = 0.45
    """The distillation weight falls from 1 to 0 over this share of the steps."""
    distil_scale: float = 10.0
    """First weight of ``1 - cos``; the sigmoid loss starts near 10."""
    warp: float = 0.7
    """Bend of still pictures in glyph pixels."""
    picture_kinds: tuple[str, ...] = ("digit", "colour", "digit")
    """Captions of still pictures, one kind a batch, in turn."""
    pair_kinds: tuple[str, ...] = ("direction", "digit")
    """Captions of frame pairs."""


def train_vision(
    out: Path,
    *,
    real_data: Path | None = None,
    seed: int = 0,
    recipe: VisionRecipe | None = None,
    config: VisionConfig | None = None,
    limit: int | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train from nothing, measure on held-out pictures, write ``config.json``, ``model.safetensors`` and ``card.json``.

    Args:
        out: Folder to write.
        real_data: Folder with ``handwritten-digits``; None trains on scikit-learn's digits alone.
        recipe: Fixed numbers of steps, so that equal seeds on equal machines give equal weights.
        limit: Measure on the first so many held-out digits of each source alone.
    Returns:
        The card.
    Raises:
        DataError: the digits cannot be read.
    """
    recipe = recipe or VisionRecipe()
    config = config or model_preset("tiny").vision
    glyphs = load_glyphs(real_data)
    started = time.process_time()
    teacher = make_teacher(BatchPainter(glyphs.train, seed + 2, warp=recipe.warp), recipe, seed=seed + 3)
    model = ContrastiveModel(
        VisionEncoder(config, seed=seed),
        all_words(),
        bias=recipe.bias,
        teacher_size=teacher.feature_size if teacher else 0,
        seed=seed + 1,
    )
    pretrain(model, BatchPainter(glyphs.train, seed, warp=recipe.warp), recipe, teacher, log=log)
    minutes = (time.process_time() - started) / 60
    figures = evaluate_vision(model, glyphs, seed=seed, limit=limit)
    model.encoder.save_pretrained(out, dtype=torch.float16)
    card = make_card(glyphs, recipe, config, seed=seed, minutes=minutes, figures=figures)
    text = json.dumps(card, indent=2) + "\n"
    (out / "card.json").write_text(text)
    written: dict[str, Any] = json.loads(text)
    return written


def make_teacher(painter: BatchPainter, recipe: VisionRecipe, *, seed: int) -> ConvTeacher | None:
    """A frozen classifier of digits in inks of every hue; None where the recipe wants no distillation."""
    if not recipe.teacher_steps:
        return None

    def draw() -> tuple[Tensor, Tensor]:
        batch = painter.pictures(recipe.batch, any_ink=True)
        return batch.frames_BT3SS[:, 0], torch.tensor(batch.digits)

    return train_teacher(ConvTeacher(len(DIGITS), seed=seed), draw, recipe.teacher_steps)


def pretrain(
    model: ContrastiveModel,
    painter: BatchPainter,
    recipe: VisionRecipe,
    teacher: ConvTeacher | None = None,
    log: Callable[[str], None] | None = None,
) -> None:
    """Stages V1, V2 and V4 of :func:`draw_step` in one run of falling learning rate; distillation fades early."""
    optimizers = make_optimizers(model, recipe)
    model.train()
    for step in range(recipe.steps):
        batch, captions = draw_step(painter, recipe, step)
        pooled = model.pooled(*patchify(batch.frames_BT3SS, model.encoder.config), batch.per_picture)
        loss = model.loss(pooled, captions)
        weight = recipe.distil_scale * distillation_weight(step, recipe.steps, recipe.distil_share)
        total = loss
        if (
            teacher is not None
            and model.teacher_head is not None
            and weight
            and not batch.directions
            and batch.per_picture == 1
        ):
            features = teacher.features(batch.frames_BT3SS[:, 0])
            total = loss + weight * distillation_loss(model.teacher_head(pooled), features)
        total.backward()
        take_step(optimizers, learning_rate_share(step, recipe))
        if log is not None and (step % 100 == 99 or step + 1 == recipe.steps):
            log(f"step {step + 1}/{recipe.steps} contrastive loss {loss.item():.3f}")


def take_step(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Step with every learning rate at ``share`` of its first value, and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["first_lr"] * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def draw_step(painter: BatchPainter, recipe: VisionRecipe, step: int) -> tuple[PictureBatch, list[str]]:
    """The batch of a step and its captions.

    Still pictures take turns in kinds of caption and, in groups of one round of kinds, in looks: V1 large digits, V2
    also several digits in one wide picture, V4 also small digits; in V4 every odd step brings frame pairs instead.
    """
    motion = step >= round(recipe.motion_from * recipe.steps)
    if motion and step % 2:
        kind = recipe.pair_kinds[step // 2 % len(recipe.pair_kinds)]
        batch = painter.frame_pairs(recipe.batch, any_ink="colour" not in kind)
        return batch, batch.captions(kind)
    native = step >= round(recipe.native_from * recipe.steps)
    looks = ("large", *(("scene",) if native else ()), *(("small",) if motion else ()))
    group, turn = divmod(step // 2 if motion else step, len(recipe.picture_kinds))
    kind, look = recipe.picture_kinds[turn], looks[group % len(looks)]
    any_ink = "colour" not in kind
    if look == "scene":
        per_picture = 2 + group // len(looks) % 2
        batch = painter.scenes(recipe.batch // per_picture, per_picture, any_ink=any_ink)
    else:
        batch = painter.pictures(recipe.batch, MOVING_BOX if look == "small" else PICTURE_BOX, any_ink=any_ink)
    return batch, batch.captions(kind)


def learning_rate_share(step: int, recipe: VisionRecipe) -> float:
    """Linear warm-up, then linear decay to ``final_lr``."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return warm * (1.0 - (1.0 - recipe.final_lr) * step / max(1, recipe.steps - 1))


def make_optimizers(model: ContrastiveModel, recipe: VisionRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and heads, AdamW for everything else."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.projector") or parameter is model.log_temperature or parameter is model.bias:
            continue
        (matrices if parameter.ndim == 2 and "embedding" not in name else others).append(parameter)
    muon = Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay)
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": recipe.adam_lr},
        {"params": [model.log_temperature, model.bias], "lr": 10 * recipe.adam_lr, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["first_lr"] = group["lr"]
    return [muon, adam]


LICENCES = {
    "sklearn": "load_digits of scikit-learn (BSD-3-Clause); UCI, optical recognition of handwritten digits",
    "mnist": "MNIST, LeCun, Cortes, Burges: CC BY-SA 3.0",
    "weights": "the project's; trained on nothing but the above",
}
"""Of what the weights were made from."""


def make_card(
    glyphs: Glyphs,
    recipe: VisionRecipe,
    config: VisionConfig,
    *,
    seed: int,
    minutes: float,
    figures: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What was trained, on what, how well: beside the weights as ``card.json``."""
    train = glyphs.train
    options = f"--steps {recipe.steps} --seed {seed}"
    if recipe.native_from != VisionRecipe().native_from:
        options += f" --native-from {recipe.native_from:g}"
    if recipe.teacher_steps:
        options += f" --teacher-steps {recipe.teacher_steps}"
    data = f"{REAL_DATA_VARIABLE}=FOLDER " if len(glyphs.held_out_mnist) else ""
    digest = hashlib.sha256(train.images.tobytes() + train.labels.tobytes()).hexdigest()
    return {
        "component": "vision encoder (LongCat-ViT, tiny) with projector",
        "command": f"{data}python -m pipelines.components.vision --out DIR {options}",
        "seed": seed,
        "cpu_minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trained": {"vit": True, "projector": False},
        "note": "The projector is as initialised by the seed; the curriculum trains it.",
        "figures": figures,
        "recipe": asdict(recipe),
        "config": config.model_dump(mode="json"),
        "training_data": {"sha256": digest, "ids": id_ranges(train.ids), "count": len(train)},
        "held_out": {
            "ids": id_ranges(glyphs.held_out_sklearn.ids + glyphs.held_out_mnist.ids),
            "combinations": "colour-digit pairs of words.pairs(held_out=True) were never drawn",
        },
        "licences": LICENCES,
    }


def id_ranges(ids: Sequence[str]) -> list[str]:
    """``sklearn-0000..sklearn-1399`` for runs of numbered ids."""
    ranges: list[list[str]] = []
    for name in ids:
        source, number = name.rsplit("-", 1)
        if ranges and ranges[-1][1] == f"{source}-{int(number) - 1:0{len(number)}d}":
            ranges[-1][1] = name
        else:
            ranges.append([name, name])
    return [f"{first}..{last}" for first, last in ranges]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; figures as one JSON document on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.components.vision", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimiser steps (default %(default)s)")
    add_scale(parser)
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default %(default)s)")
    parser.add_argument(
        "--native-from", type=float, default=1.0, help="share of the steps after which wide pictures join; 1 for never"
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=0, help="train a convolutional teacher so long and distil from it"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = VisionRecipe(
        steps=scaled_steps(options.steps, options.scale),
        native_from=options.native_from,
        teacher_steps=options.teacher_steps,
    )
    folder = os.environ.get(REAL_DATA_VARIABLE)
    try:
        card = train_vision(
            options.out,
            real_data=Path(folder) if folder else None,
            seed=options.seed,
            recipe=recipe,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except OmniError as error:
        print(f"vision: {error}", file=sys.stderr)
        return 1
    print(json.dumps(card["figures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
