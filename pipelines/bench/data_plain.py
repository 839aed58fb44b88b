"""The plain loader of the data bench: webdataset, torchvision, PyAV and torch's DataLoader, as their manuals put them.

It decodes to what ours decodes to (224 x 224 pictures, 12 frames of 56 x 84 a film) and collates; it knows no mixture
but webdataset's, and neither packs nor tokenises.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 32


class PlainDecode:
    """Decode one webdataset sample; pickles, since loader workers get it."""

    def __init__(self, picture_size: tuple[int, int], clip_size: tuple[int, int], clip_frames: int) -> None:
        self.picture_size = picture_size
        self.clip_size = clip_size
        self.clip_frames = clip_frames

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
        """[F, 3, h, w] uint8; frames at the middles of equal segments."""
        import av
        from torchvision.transforms.v2 import functional

        with av.open(io.BytesIO(raw), "r") as container:
            stream = container.streams.video[0]
            count = stream.frames
            wanted = {int((i + 0.5) * count / self.clip_frames) for i in range(self.clip_frames)}
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                for number, frame in enumerate(container.decode(stream))
                if number in wanted
            ]
        whole = torch.stack(frames)
        return functional.resize(whole, list(self.clip_size), functional.InterpolationMode.BICUBIC, antialias=True)


def plain_loader(root: Path, decode: PlainDecode, workers: int, shares: Sequence[float]) -> Callable[[], Iterator[Any]]:
    """A function that starts the loader and gives its batches; endless, shuffled, mixed by ``shares``."""
    import torchvision.io  # noqa: F401  # registers the decoder
    import webdataset

    parts = []
    for name in ("picture", "clip"):
        urls = [str(path) for path in sorted((root / name).glob("*.tar"))]
        part = webdataset.WebDataset(urls, resampled=True, nodesplitter=None, shardshuffle=False, seed=0)
        parts.append(part.shuffle(100))
    mixed = webdataset.DataPipeline(
        webdataset.RandomMix(parts, list(shares)), webdataset.map(decode), webdataset.batched(BATCH, collation_fn=list)
    )
    loader = torch.utils.data.DataLoader(mixed, batch_size=None, num_workers=workers)
    return lambda: iter(loader)
