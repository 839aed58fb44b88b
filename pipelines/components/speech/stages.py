"""One stage of the codec's training: its phases in order, from the beginning or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omni_ray.config.model import model_preset
from omni_ray.config.speech_training import SpeechRecipe, SpeechStage
from omni_ray.models.audio_decoder import AudioDecoder
from omni_ray.models.codec import Codec
from omni_ray.types.errors import DataError
from pipelines.components.codec_material import Clip
from pipelines.components.codec_stages import Cropper
from pipelines.components.speech.acoustic import Decoding, Latents, Wave16, checked_modules, shared_codes
from pipelines.components.speech.group import Group
from pipelines.components.speech.loop import Objective, PhaseState, run_phase, step_chance
from pipelines.components.speech.semantic import Ctc, Pretraining, shared_kmeans

ASSISTANT = "assistant"
Keep = Callable[[str, PhaseState, Callable[[], dict[str, Any]]], None]


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """What a stage is made of; equal on every worker."""

    stage: SpeechStage
    recipe: SpeechRecipe
    codec: Codec
    clips: Sequence[Clip]
    group: Group

    @property
    def seed(self) -> int:
        """Of the whole recipe."""
        return self.recipe.seed


def new_codec(recipe: SpeechRecipe) -> Codec:
    """A codec of the recipe's size at its random start."""
    torch.manual_seed(recipe.seed)
    return Codec(model_preset(recipe.size).codec)


def run_stage(run: StageRun, resume: Mapping[str, Any] | None, keep: Keep) -> dict[str, nn.Module]:
    """Train all phases of the stage; the codec of ``run`` is changed.

    Args:
        resume: What :func:`stage_state` made, to go on from; None begins.
        keep: Called after every step: phase, its state, and a function that makes its part of the checkpoint.
    Returns:
        What the stage leaves besides the codec.
    """
    left: dict[str, nn.Module] = {}
    run.codec.train()
    if run.stage == "kmeans":
        shared_kmeans(run.codec.eval(), run.clips, run.recipe.kmeans, run.group, seed=run.seed)
        return left
    phases = list(run.recipe.phases(run.stage))
    first = phases.index(resume["phase"]) if resume else 0
    for name in phases[first:]:
        state = PhaseState()
        if resume and name == resume["phase"]:
            state = PhaseState(step=resume["step"], saved=resume["saved"])
            # Before the objective is built: it codes the clips with these weights.
            run.codec.load_state_dict(resume["saved"]["modules"]["codec"])
        # Read-outs, heads and discriminators begin alike on every worker.
        torch.manual_seed(int(torch.randint(0, 1 << 31, (), generator=step_chance(run.seed, name, -1))))
        objective = build_objective(run, name)
        run.codec.train()
        # What a phase before sent through weights that were not its own to train.
        run.codec.zero_grad(set_to_none=True)
        run_phase(name, objective, run.group, state, seed=run.seed, keep=_named(keep, name))
        left |= checked_modules(objective.modules)
    run.codec.eval()
    return left


def _named(keep: Keep, name: str) -> Callable[[PhaseState, Callable[[], dict[str, Any]]], None]:
    return lambda state, make: keep(name, state, make)


def stage_state(phase: str, state: PhaseState, made: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in the middle of a stage."""
    return {"phase": phase, "step": state.step, "saved": made}


def build_objective(run: StageRun, name: str) -> Objective:
    """The mathematics of one phase by its name."""
    recipe, codec = run.recipe, run.codec
    if name == "pretrain":
        return Pretraining(codec, run.clips, recipe.pretrain, seed=run.seed)
    if name == "ctc":
        return Ctc(codec, run.clips, recipe.ctc)
    if name in ("latents", "coded"):
        cropper = _cropper(run, run.clips, acoustic=False)
        return Latents(codec, cropper, recipe.encoder, seed=run.seed, coded=name == "coded")
    if name == "wave16":
        decoder = AudioDecoder(codec.config, codec.config.sample_rate_hz)
        return Wave16(codec, _cropper(run, run.clips, acoustic=False), recipe.encoder, decoder)
    if name == "speaker":
        cropper = _cropper(run, speakers_clips(run.clips, recipe.speaker.speakers), acoustic=True)
        return Decoding(codec, cropper, recipe.speaker.polish, recipe.speaker.weights)
    stage, cropper = recipe.decoder, _cropper(run, run.clips, acoustic=True)
    if name == "mel":
        return Decoding(codec, cropper, stage.mel, stage.weights, front_only=True)
    # The read-out of the front stands beside the first cycle on the waveform only.
    weights = stage.weights if name == "wave" else stage.weights.model_copy(update={"frame": 0.0})
    objective = Decoding(codec, cropper, stage.wave if name == "wave" else stage.polish, weights)
    objective.codebooks = stage.codebooks
    return objective


def _cropper(run: StageRun, clips: Sequence[Clip], *, acoustic: bool) -> Cropper:
    return Cropper(clips, shared_codes(run.codec, clips, run.group, acoustic=acoustic), run.codec, seed=run.seed)


def speakers_clips(clips: Sequence[Clip], speakers: Sequence[str]) -> list[Clip]:
    """Clips of some speakers.

    Raises:
        DataError: a speaker who is not in the data, with those who are.
    """
    if not speakers:
        return [clip for clip in clips if clip.kind == ASSISTANT] or list(clips)
    known = {clip.source for clip in clips}
    missing = sorted(set(speakers) - known)
    if missing:
        raise DataError(f"speaker.speakers names {', '.join(missing)}; the data have {', '.join(sorted(known))}")
    return [clip for clip in clips if clip.source in speakers]
