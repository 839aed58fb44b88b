"""Both sides of the data bench decode the same frames at the same sizes; every shard holds the same of each film."""

from __future__ import annotations

import gc
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omni_ray.data.video import video_frames
from omni_ray.training.prepare import StepBuilder
from pipelines.bench import data_material
from pipelines.bench.data import PICTURE_SIZE
from pipelines.bench.data_material import CLIPS, SHARDS, SHARES, material_recipe, write_material
from pipelines.bench.data_plain import BATCH, PlainDecode, clip_looks, plain_loader


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    root = tmp_path_factory.mktemp("material")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_material, "PICTURES", 64)
        patch.setattr(data_material, "real_clips", list)
        return root, write_material(root, 0)


def test_every_shard_holds_the_same_of_each_film(material: tuple[Path, list[bytes]]) -> None:
    root, clips = material
    for shard in sorted((root / "clip").glob("*.tar")):
        with tarfile.open(shard) as tar:
            raws = [tar.extractfile(member).read() for member in tar if member.name.endswith("mp4")]  # type: ignore[union-attr]
        assert Counter(raws) == {clip: CLIPS // SHARDS // len(clips) for clip in clips}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its shards open
def test_the_plain_side_decodes_what_ours_does(material: tuple[Path, list[bytes]]) -> None:
    root, clips = material
    recipe = material_recipe(root, 1, 0)
    decode = PlainDecode(PICTURE_SIZE, clip_looks(clips, recipe.networks.vision))
    batches = plain_loader(root, decode, 0, SHARES, CLIPS // SHARDS)()
    for _ in range(3):
        batch = next(batches)
        shapes = Counter(media.shape for media, _ in batch)
        assert len(batch) == BATCH
        assert shapes == {(3, *PICTURE_SIZE): SHARES["picture"], (12, 3, 56, 84): SHARES["clip"]}
    del batches
    gc.collect()
    prepared = StepBuilder(recipe, root).build(0)
    ours = Counter(media.shape for media in prepared.media.values())
    assert ours == {(1, *PICTURE_SIZE, 3): SHARES["picture"], (2, 56, 84, 3): 6 * SHARES["clip"]}
    theirs = decode.clip(clips[0]).permute(0, 2, 3, 1).numpy()
    here = video_frames(clips[0], "clip", recipe.networks.vision)
    assert np.abs(theirs.astype(int) - here).max() <= 1
