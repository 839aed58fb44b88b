"""LongCat-ViT against a slow transcription of networks.md section 1, and its folder."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from omni_ray.config.model import VisionConfig, model_preset
from omni_ray.data.image import fit_size
from omni_ray.models import vision_passes
from omni_ray.models.native.passes import passes
from omni_ray.models.projector import Grid
from omni_ray.models.vision_encoder import Block, VisionEncoder, rope_angles
from omni_ray.models.vision_passes import rotate
from omni_ray.types.errors import CheckpointError, MediaError

SMALL = VisionConfig(
    hidden_size=32,
    num_heads=2,
    num_layers=2,
    intermediate_size=48,
    rope_base=10.0,
    adaptor_dim=24,
    output_size=20,
    min_patches=4,
    max_patches=64,
    side_multiple=28,
)
MIXED: list[Grid] = [(1, 4, 4), (2, 2, 6), (1, 4, 2), (3, 4, 4), (1, 2, 2)]


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs over the compiled passes and over torch's operations."""
    if request.param == "plain":
        monkeypatch.setattr(vision_passes, "passes", lambda: None)
    elif passes() is None:
        pytest.skip("no C compiler")


def draw_patches(config: VisionConfig, grids: list[Grid], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(math.prod(grid), config.patch_values, generator=generator) for grid in grids]


def shaken(config: VisionConfig, seed: int = 0) -> VisionEncoder:
    """An encoder whose gains and scales are not all one, so that a forgotten one shows."""
    encoder = VisionEncoder(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def slow_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def slow_rotate(vector_d: Tensor, row: int, column: int, base: float) -> Tensor:
    """networks.md: angle = concat(h inv_freq, w inv_freq) repeated twice; rotate-half pairing; one head, one patch."""
    d = len(vector_d)
    inv_freq = torch.tensor([base ** (-2 * i / (d / 2)) for i in range(d // 4)])
    angle = torch.cat([row * inv_freq, column * inv_freq]).repeat(2)
    half = torch.cat([-vector_d[d // 2 :], vector_d[: d // 2]])
    return vector_d * angle.cos() + half * angle.sin()


def slow_window(encoder: VisionEncoder, patches: Tensor, height: int, width: int) -> Tensor:
    """ViT features of one frame pair, patch by patch and head by head."""
    config, eps = encoder.config, encoder.config.norm_eps
    size, heads, d = config.hidden_size, config.num_heads, config.hidden_size // config.num_heads
    conv = encoder.vit.embeddings.patch_embedding
    cube = patches.view(-1, 3, config.temporal_patch_size, config.patch_size, config.patch_size)
    x = F.conv3d(cube, conv.weight, conv.bias, stride=conv.stride).flatten(1)
    for block in encoder.vit.encoder.layers:
        assert isinstance(block, Block)
        q, k, v = (slow_rms(x, block.norm1.weight, eps) @ block.attn.qkv.weight.T).split(size, dim=1)
        turned = []
        for matrix in (q, k):
            rows = []
            for p in range(height * width):
                pieces = [
                    slow_rotate(matrix[p, n * d : (n + 1) * d], p // width, p % width, config.rope_base)
                    for n in range(heads)
                ]
                rows.append(torch.cat(pieces))
            turned.append(torch.stack(rows))
        q, k = slow_rms(turned[0], block.attn.q_norm.weight, eps), slow_rms(turned[1], block.attn.k_norm.weight, eps)
        mixed = []
        for n in range(heads):
            part = slice(n * d, (n + 1) * d)
            mixed.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=-1) @ v[:, part])
        x = x + block.ls1 * (torch.cat(mixed, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias)
        y, mlp = slow_rms(x, block.norm2.weight, eps), block.mlp
        gate, up = y @ mlp.fc1.weight.T + mlp.fc1.bias, y @ mlp.fc3.weight.T + mlp.fc3.bias
        inner = slow_rms(gate * torch.sigmoid(gate) * up, mlp.norm.weight, eps)
        x = x + block.ls2 * (inner @ mlp.fc2.weight.T + mlp.fc2.bias)
    return x


def slow_features(encoder: VisionEncoder, items: list[Tensor], grids: list[Grid]) -> Tensor:
    windows = [
        slow_window(encoder, window, height, width)
        for item, (_, height, width) in zip(items, grids, strict=True)
        for window in item.split(height * width)
    ]
    return torch.cat(windows)


@pytest.mark.parametrize("grids", [[(1, 4, 4)] * 3, MIXED], ids=["equal", "mixed"])
def test_features_equal_slow_transcription(grids: list[Grid]) -> None:
    encoder = shaken(SMALL)
    items = draw_patches(SMALL, grids)
    with torch.no_grad():
        fast, slow = encoder.vit_features(torch.cat(items), grids), slow_features(encoder, items, grids)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_gradients_equal_slow_transcription() -> None:
    encoder = shaken(SMALL)
    items = draw_patches(SMALL, MIXED)
    weights = torch.randn(sum(map(len, items)), SMALL.hidden_size, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*encoder.vit.named_parameters(), strict=True)
    fast = torch.autograd.grad((encoder.vit_features(torch.cat(items), MIXED) * weights).sum(), parameters)
    slow = torch.autograd.grad((slow_features(encoder, items, MIXED) * weights).sum(), parameters)
    for name, a, b in zip(names, fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def random_config(seed: int) -> VisionConfig:
    draw = random.Random(seed)
    heads, temporal = draw.choice([1, 2, 3, 5]), draw.choice([1, 2])
    return VisionConfig(
        hidden_size=heads * draw.choice([4, 8, 12]),
        num_heads=heads,
        num_layers=draw.choice([1, 2, 3]),
        intermediate_size=draw.choice([24, 30, 50]),
        patch_size=draw.choice([7, 14]),
        temporal_patch_size=temporal,
        rope_base=draw.choice([10.0, 10000.0]),
        norm_eps=draw.choice([1e-6, 1e-3]),
        adaptor_dim=16,
        output_size=8,
        min_patches=4,
        max_patches=400,
        side_multiple=28,
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_equal_the_slow_transcription(seed: int) -> None:
    config = random_config(seed)
    encoder = shaken(config, seed)
    draw = random.Random(100 + seed)
    grids: list[Grid] = [(draw.randint(1, 3), draw.randint(1, 4), 2 * draw.randint(1, 3)) for _ in range(3)]
    items = draw_patches(config, grids, seed)
    fast, slow = encoder.vit_features(torch.cat(items), grids), slow_features(encoder, items, grids)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(seed))
    names, parameters = zip(*encoder.vit.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), parameters) for out in (fast, slow))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("size", ["tiny", "own"])
def test_packed_equals_one_by_one_bit_for_bit(size: str) -> None:
    """Rows are padded to multiples of 16, so an item does not feel who shares its batch (CPU, fp32)."""
    config = SMALL if size == "own" else model_preset("tiny").vision
    encoder = shaken(config)
    for grids in ([(1, 4, 4)] * 5, MIXED):
        items = draw_patches(config, grids)
        with torch.no_grad():
            packed = encoder(torch.cat(items), grids)
            single = torch.cat([encoder(item, [grid]) for item, grid in zip(items, grids, strict=True)])
        assert torch.equal(packed, single)
        # Without a graph activations are written over and come in runs: recomputation relies on the same bits.
        assert torch.equal(encoder(torch.cat(items), grids).detach(), packed)


def test_repeat_gives_same_bits_forward_and_backward() -> None:
    config = model_preset("tiny").vision
    encoder, grids = VisionEncoder(config), [(1, 4, 4)] * 4
    patches = torch.cat(draw_patches(config, grids))
    runs = []
    for _ in range(2):
        encoder.zero_grad()
        out = encoder(patches, grids)
        out.square().sum().backward()
        runs.append([out.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_frame_pairs_do_not_attend_to_each_other() -> None:
    encoder = shaken(SMALL)
    (patches,) = draw_patches(SMALL, [(2, 2, 4)])
    changed = patches.clone()
    changed[8:] += 1.0
    with torch.no_grad():
        before, after = encoder(patches, [(2, 2, 4)]), encoder(changed, [(2, 2, 4)])
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


def test_rope_turns_pairs_by_row_and_column() -> None:
    height, width, d, base = 3, 5, 16, 100.0
    angles = rope_angles(height, width, d, base)
    vectors = torch.randn(height * width, 1, d, generator=torch.Generator().manual_seed(0))
    turned = rotate(vectors, angles.cos()[:, None], angles.sin()[:, None])
    for p in range(height * width):
        torch.testing.assert_close(turned[p, 0], slow_rotate(vectors[p, 0], p // width, p % width, base))


def test_rope_scores_depend_on_offsets_alone() -> None:
    angles = rope_angles(4, 4, 16, 10.0)
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    q, k = (rotate(x.expand(16, 1, 16), angles.cos()[:, None], angles.sin()[:, None])[:, 0] for x in (query, key))
    # Patch (1, 1) to (2, 3) and patch (0, 0) to (1, 2): the same step of one row and two columns.
    torch.testing.assert_close(q[5] @ k[11], q[0] @ k[6])
    assert not torch.isclose(q[5] @ k[11], q[0] @ k[9])


def test_every_parameter_gets_a_gradient() -> None:
    encoder = shaken(SMALL)
    patches = torch.cat(draw_patches(SMALL, MIXED))
    encoder(patches, MIXED).square().sum().backward()
    silent = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_parameters_follow_the_seed_and_leave_global_state() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (VisionEncoder(SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["vit.encoder.layers.0.attn.qkv.weight"], other["vit.encoder.layers.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("size", "vit_m", "projector_m"), [("flash-omni", 636.6, 113.8), ("small", 18.2, None), ("tiny", 0.243, None)]
)
def test_parameter_counts(size: str, vit_m: float, projector_m: float | None) -> None:
    config = model_preset(size).vision  # type: ignore[arg-type]
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    count = sum(p.numel() for p in encoder.vit.parameters())
    d, m, p = config.hidden_size, config.mlp_size, config.patch_size
    formula = config.num_layers * (4 * d * d + d + 2 * d + 3 * d * m + 2 * m + d + m + 4 * d) + 6 * p * p * d + d
    assert count == formula
    assert round(count / 1e6, 1 if vit_m > 1 else 3) == vit_m
    if projector_m is not None:
        assert round(sum(p.numel() for p in encoder.projector.parameters()) / 1e6, 1) == projector_m


def test_published_names() -> None:
    names = set(VisionEncoder(SMALL.model_copy(update={"num_layers": 1})).state_dict())
    block = "vit.encoder.layers.0."
    assert names == {
        "vit.embeddings.patch_embedding.weight",
        "vit.embeddings.patch_embedding.bias",
        *(f"{block}{n}" for n in ("ls1", "ls2", "norm1.weight", "norm2.weight", "mlp.norm.weight")),
        *(f"{block}attn.{n}.weight" for n in ("qkv", "proj", "q_norm", "k_norm")),
        *(f"{block}mlp.{n}.{kind}" for n in ("fc1", "fc2", "fc3") for kind in ("weight", "bias")),
        f"{block}attn.proj.bias",
        *(f"projector.{n}.{kind}" for n in ("p0.0", "p0.1", "p0.3", "proj") for kind in ("weight", "bias")),
    }


def test_bfloat16_stays_near_fp32() -> None:
    encoder = VisionEncoder(SMALL)
    patches = torch.cat(draw_patches(SMALL, MIXED))
    with torch.no_grad():
        exact = encoder(patches, MIXED)
        rough = encoder.bfloat16()(patches.bfloat16(), MIXED)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


def test_no_items_is_a_normal_batch() -> None:
    encoder = VisionEncoder(SMALL)
    assert encoder(torch.empty(0, SMALL.patch_values), []).shape == (0, SMALL.output_size)


def test_patches_that_do_not_fit_the_grids_are_refused() -> None:
    with pytest.raises(MediaError, match=r"patches have shape \[16, 1176\], yet 1 grids of patch size 14 need \[8, 1"):
        VisionEncoder(SMALL)(torch.zeros(16, SMALL.patch_values), [(1, 2, 4)])


def test_folder_round_trip(tmp_path: Path) -> None:
    encoder = shaken(SMALL, seed=3)
    encoder.save_pretrained(tmp_path / "exact")
    encoder.save_pretrained(tmp_path / "half", dtype=torch.float16)
    exact, half = (VisionEncoder.from_pretrained(tmp_path / name) for name in ("exact", "half"))
    assert exact.config == SMALL
    for name, value in encoder.state_dict().items():
        assert torch.equal(exact.state_dict()[name], value)
        assert half.state_dict()[name].dtype == torch.float32
        assert torch.equal(half.state_dict()[name], value.half().float())
    patches = torch.cat(draw_patches(SMALL, MIXED))
    assert torch.equal(exact(patches, MIXED), encoder(patches, MIXED))
    assert sorted(p.name for p in (tmp_path / "exact").iterdir()) == ["config.json", "model.safetensors"]


def test_foreign_and_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        VisionEncoder.from_pretrained(tmp_path)
    VisionEncoder(SMALL).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    config.write_text(json.dumps({**json.loads(good_config), "hidden_size": 64}))
    shapes = r"has shape \[32, 3, 2, 14, 14\], expected \[64, 3, 2, 14, 14\]"
    with pytest.raises(CheckpointError, match=shapes):
        VisionEncoder.from_pretrained(tmp_path)
    config.write_text(json.dumps({**json.loads(good_config), "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"vit\.encoder\.layers\.2\.attn\.k_norm\.weight is missing"):
        VisionEncoder.from_pretrained(tmp_path)
    config.write_text(json.dumps({**json.loads(good_config), "model_type": "audio"}))
    with pytest.raises(CheckpointError, match="says model_type 'audio', expected 'longcat_vit'"):
        VisionEncoder.from_pretrained(tmp_path)
    config.write_text(json.dumps({**json.loads(good_config), "colour": 1}))
    with pytest.raises(CheckpointError, match="colour"):
        VisionEncoder.from_pretrained(tmp_path)
    config.write_text(good_config)
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    with pytest.raises(CheckpointError, match="cut short or not safetensors"):
        VisionEncoder.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        VisionEncoder.from_pretrained(tmp_path)


def test_values_beyond_float16_are_not_stored_as_float16(tmp_path: Path) -> None:
    encoder = VisionEncoder(SMALL)
    with torch.no_grad():
        encoder.vit.encoder.layers[0].ls1.fill_(1e6)  # type: ignore[union-attr, operator]
    with pytest.raises(CheckpointError, match=r"vit\.encoder\.layers\.0\.ls1 holds values that torch\.float16 cannot"):
        encoder.save_pretrained(tmp_path, dtype=torch.float16)
    assert not (tmp_path / "model.safetensors").exists()


def test_pixels_that_are_not_finite_and_empty_grids_are_refused() -> None:
    encoder = VisionEncoder(SMALL)
    patches = torch.zeros(16, SMALL.patch_values)
    patches[9, 5] = float("nan")
    with pytest.raises(MediaError, match=r"item 1 has pixels that are not finite \(1 of 16 patches in all\)"):
        encoder(patches, [(1, 2, 4), (1, 2, 4)])
    with pytest.raises(MediaError, match="item 0 has a grid of 1 x 0 x 4 patches; leave it out"):
        encoder(patches[:0], [(1, 0, 4)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"side_multiple": 14}, r"side_multiple is 14 pixels; merge \(1, 2\) needs a multiple of 28"),
        ({"min_patches": 6000}, "min_patches 6000 and max_patches 5832 leave no picture"),
        ({"min_patches": 1, "max_patches": 63}, "the smallest has 64 patches"),
        ({"num_heads": 7}, "vision hidden_size 1280 over 7 heads must give a multiple of 4"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(change: dict[str, int], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        VisionConfig(**change)  # type: ignore[arg-type]


def test_odd_frames_and_limits_walk_of_native_resolution() -> None:
    """networks.md section 1: inside the limits only rounding; outside scaled; small sides enlarged first."""
    config = VisionConfig()

    def patches(height: int, width: int) -> tuple[int, int, int]:
        h, w = fit_size(height, width, config)
        assert h % 112 == w % 112 == 0
        return h, w, h * w // 196

    assert patches(448, 560) == (448, 560, 1280)  # inside, already multiples
    assert patches(500, 600)[:2] == (448, 560)  # inside: each side to its nearest multiple
    assert patches(100, 100)[2] >= 576  # too small: enlarged, then raised
    assert patches(4000, 3000)[2] <= 5832  # too big: scaled, then floored
    big_h, big_w, _ = patches(4000, 3000)
    assert abs(big_h / big_w - 4 / 3) < 0.2
    assert 576 <= patches(56, 2000)[2] <= 5832
