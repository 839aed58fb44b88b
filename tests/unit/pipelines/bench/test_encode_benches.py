"""The padded sides of the encoder benches compute what the packed encoders do, and a wrong one is refused."""

from __future__ import annotations

import pytest
import torch

from omni_ray.config.model import model_preset
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.streaming import item_runs
from omni_ray.models.vision_encoder import RUN_ROWS, VisionEncoder
from omni_ray.types.errors import OmniError
from pipelines.bench import audio_encode, moe_gemm, vision_encode


@torch.no_grad()
def test_padded_pictures_equal_packed_ones() -> None:
    encoder = VisionEncoder(model_preset("tiny").vision, seed=1).eval()
    grids = [(1, h, w) for _, h, w in vision_encode.draw_grids(3)[:10]]
    items = [torch.randn(h * w, encoder.config.patch_values) for _, h, w in grids]
    packed, padded = encoder(torch.cat(items), grids), vision_encode.padded_encode(encoder, items, grids)
    vision_encode.check_equal(packed, padded, encoder, grids)
    padded[3] = padded[3] + 0.01
    with pytest.raises(OmniError, match=r"picture 3: packed and padded rows differ by 0\.01"):
        vision_encode.check_equal(packed, padded, encoder, grids)


@torch.no_grad()
def test_padded_utterances_equal_packed_ones() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(model_preset("tiny").audio).eval()
    waves = audio_encode.draw_waves(5)[:12]
    rows, lengths = encoder(waves)
    padded = audio_encode.padded_encode(encoder, waves)
    audio_encode.check_equal(rows, lengths, padded)
    padded[7] = padded[7] * 1.1
    with pytest.raises(OmniError, match="utterance 7"):
        audio_encode.check_equal(rows, lengths, padded)


def test_loads_are_those_of_the_targets() -> None:
    grids = vision_encode.draw_grids(0)
    assert len(grids) == 32
    assert all(64 <= h * w <= 1024 and w % 2 == 0 for _, h, w in grids)
    seconds = sorted(len(wave) / 16000 for wave in audio_encode.draw_waves(0))
    assert len(seconds) == 32
    assert max(seconds) <= 30
    assert 2.5 < seconds[16] < 6.5


def test_the_same_bits_with_and_without_a_graph() -> None:
    """Without a graph long batches run in cache-sized pieces; nothing of it may show."""
    encoder = VisionEncoder(model_preset("tiny").vision, seed=1).eval()
    grids = [(1, 16, 16), (2, 8, 12), (1, 30, 30), (1, 4, 4), (1, 16, 20)]
    patches = torch.randn(sum(t * h * w for t, h, w in grids), encoder.config.patch_values)
    assert len(patches) > RUN_ROWS
    with torch.no_grad():
        pieces = encoder(patches, grids)
    assert torch.equal(pieces, encoder(patches, grids).detach())


def test_runs_cover_every_item_once() -> None:
    lengths = [3, 9, 1, 1, 20, 4, 0, 2]
    runs = item_runs(lengths, 10)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(8))
    assert all(sum(lengths[run]) <= 10 or run.stop - run.start == 1 for run in runs)
    assert item_runs([], 10) == []


def test_pairs_of_the_moe_bench_shrink_with_context_parallelism() -> None:
    assert [moe_gemm.TOKENS // cp for cp in moe_gemm.CONTEXT_PARALLEL] == [8192, 4096, 2048, 1024]
