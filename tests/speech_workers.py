"""A small codec's training for tests: clips, a short recipe, and workers that are processes without Ray.

    python speech_workers.py RANK SIZE FOLDER STAGE...

runs the stages as one worker of a group and leaves the codec of each in ``FOLDER/RANK-STAGE.pt``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from omni_ray.config.speech_training import SpeechRecipe, SpeechStage
from pipelines.components.codec_material import Clip
from pipelines.components.speech import acoustic
from pipelines.components.speech.group import Group, TorchGroup
from pipelines.components.speech.stages import StageRun, new_codec, run_stage


def trained(stage: SpeechStage, group: Group) -> dict[str, torch.Tensor]:
    """Weights after a stage of the short recipe, from a random codec."""
    recipe = short_recipe()
    run = StageRun(stage=stage, recipe=recipe, codec=new_codec(recipe), clips=tones(), group=group)
    left = run_stage(run, None, lambda *_: None)
    values = dict(run.codec.state_dict())
    for name, module in left.items():
        values |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return values


def train_apart(size: int, folder: Path, stages: list[SpeechStage]) -> list[dict[SpeechStage, dict[str, torch.Tensor]]]:
    """The stages by so many processes of one gloo group; what each of them holds at the end."""
    commands = [[sys.executable, __file__, str(rank), str(size), str(folder), *stages] for rank in range(size)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    return [{stage: torch.load(folder / f"{rank}-{stage}.pt") for stage in stages} for rank in range(size)]


def few_crops() -> None:
    """Set the quantiser from few crops: the hundreds of a real run take seconds, and nothing here hangs on them."""
    acoustic.START_CROPS, acoustic.FIT_CROPS = 4, 16


def tones(count: int = 6) -> list[Clip]:
    """Short swelling tones that "say" words of the world."""
    clips = []
    for number in range(count):
        seconds = 0.7 + 0.1 * (number % 3)
        waves = {}
        for rate in (16000, 24000):
            time_s = torch.arange(int(seconds * rate)) / rate
            pitch = 180.0 + 40.0 * number
            waves[rate] = 0.3 * torch.sin(2 * torch.pi * pitch * time_s) * torch.sin(torch.pi * time_s / seconds)
        kind = ("assistant", "synthetic")[number % 2]
        word = ("one", "red", "up")[number % 3]
        clips.append(
            Clip(
                id=f"tone-{number}",
                kind=kind,
                source=f"voice-{number % 2}",
                words=(word,),
                input_S=waves[16000],
                output_S=waves[24000],
            )
        )
    return clips


def short_recipe(**changes: Any) -> SpeechRecipe:
    """Every stage with a few steps of small batches; discriminators of a few channels."""
    phase = {"steps": 3, "batch": 4, "parts": 2, "frames": 6, "lr": 1e-3}
    few = {"periods": [2, 3], "period_channels": [4, 4], "windows": [256], "band_channels": 2}
    against = phase | {"adversarial": {"start": 1, "warm_up": 1, "discriminators": few}}
    raw: dict[str, Any] = {
        "checkpoint_every": 2,
        "pretrain": {"targets": {"codes": 16, "mask_share": 0.2, "mask_s": 0.12}, "train": phase},
        "ctc": {"train": phase},
        "kmeans": {"rounds": 3, "rows": 64},
        "encoder": {"latents": phase, "coded": phase, "wave": against, "encoder_lr_share": 0.1},
        "decoder": {"mel": phase, "wave": phase, "polish": against, "weights": {"frame": 4.5}},
        "speaker": {"speakers": ["voice-1"], "polish": phase},
    }
    return SpeechRecipe.model_validate(raw | changes)


def main() -> None:
    """One worker."""
    rank, size, folder, *stages = sys.argv[1:]
    torch.set_num_threads(1)
    few_crops()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(size)
    )
    for stage in stages:
        torch.save(trained(stage, TorchGroup()), Path(folder) / f"{rank}-{stage}.pt")  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
