"""The plain loader of the data bench: webdataset, torchvision, PyAV and torch's DataLoader, as their manuals put them.

It decodes to what ours decodes to (see :func:`clip_looks`) and collates; it mixes by webdataset's round robin, in which
every batch holds the same share of films, and neither packs nor tokenises.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.config.model import VisionConfig
from omni_ray.data.video import plan_video, video_extent

BATCH = 32
_SHUFFLED = 100
"""Pictures that webdataset holds to shuffle; of films as many as a shard has, or their mean cost would wander."""

Extent = tuple[int, int, int]
"""(frames, height, width) of a film."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is decoded of a film."""

    frames: frozenset[int]
    """Numbers of the frames."""
    size: tuple[int, int]
    """(height, width) of each."""


def clip_looks(clips: Iterable[bytes], vision: VisionConfig) -> dict[Extent, Look]:
    """What our side decodes of each film, so that the plain side decodes the same."""
    looks = {}
    for raw in clips:
        plan = plan_video(raw, "clip", vision)
        size = plan.grid[1] * vision.patch_size, plan.grid[2] * vision.patch_size
        looks[video_extent(raw, "clip")] = Look(frames=frozenset(plan.frames), size=size)
    return looks


class PlainDecode:
    """Decode one webdataset sample; pickles, since loader workers get it."""

    def __init__(self, picture_size: tuple[int, int], looks: Mapping[Extent, Look]) -> None:
        self.picture_size = picture_size
        self.looks = dict(looks)

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, str]:
        torch.set_num_threads(1)
        text = sample["txt"].decode()
        if "jpg" in sample:
            return self.picture(sample["jpg"]), text
        return self.clip(sample["mp4"]), text

    def picture(self, raw: bytes) -> Tensor:
        """[3, h, w] uint8."""
        from torchvision.transforms.v2 import functional

        pixels = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8), 3, False)
        return functional.resize(pixels, list(self.picture_size), functional.InterpolationMode.BICUBIC, antialias=True)

    def clip(self, raw: bytes) -> Tensor:
        """[F, 3, h, w] uint8; decoding stops behind the last frame that is looked at."""
        import av
        from torchvision.transforms.v2 import functional

        with av.open(io.BytesIO(raw), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # as many workers as cores: more threads only cost it
            look = self.looks[stream.frames, stream.height, stream.width]
            frames, last = [], max(look.frames)
            for number, frame in enumerate(container.decode(stream)):
                if number in look.frames:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
                if number >= last:
                    break
        whole = torch.stack(frames)
        return functional.resize(whole, list(look.size), functional.InterpolationMode.BICUBIC, antialias=True)


def plain_loader(
    root: Path, decode: PlainDecode, workers: int, shares: Mapping[str, int], clips_a_shard: int
) -> Callable[[], Iterator[Any]]:
    """A function that starts the loader and gives its batches; endless, shuffled.

    Args:
        root: Holds a folder of shards a source.  shares: Samples of each source in a batch.
        clips_a_shard: Films that are held to be shuffled.
    """
    import torchvision.io  # noqa: F401  # registers the decoder
    import webdataset

    common = math.gcd(*shares.values())
    parts = []
    for name, share in shares.items():
        urls = [str(path) for path in sorted((root / name).glob("*.tar"))]
        part = webdataset.WebDataset(urls, resampled=True, nodesplitter=None, shardshuffle=False, seed=0)
        held = clips_a_shard if name == "clip" else _SHUFFLED
        parts.append(part.shuffle(held).batched(share // common, collation_fn=list))
    mixed = webdataset.DataPipeline(
        webdataset.RoundRobin(parts),
        webdataset.filters.unlisted(),
        webdataset.map(decode),
        webdataset.batched(BATCH, collation_fn=list),
    )
    loader = torch.utils.data.DataLoader(mixed, batch_size=None, num_workers=workers)
    return lambda: iter(loader)
