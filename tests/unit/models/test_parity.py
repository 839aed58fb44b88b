"""Same numbers as the LongcatFlash of transformers, through the released folder layout, both ways."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig
from omni_ray.models import weights
from omni_ray.models.llm import LanguageModel
from omni_ray.models.tensor_files import SafetensorsFolder

transformers = pytest.importorskip("transformers")


def random_config(seed: int) -> LanguageConfig:
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4])
    experts, zero = draw.choice([2, 3, 8, 12]), draw.choice([0, 2, 5])
    return LanguageConfig(
        vocab_size=draw.choice([61, 128]),
        hidden_size=draw.choice([48, 64, 72]),
        num_layers=draw.choice([1, 2, 3]),
        num_attention_heads=heads,
        ffn_hidden_size=draw.choice([56, 96]),
        q_lora_rank=draw.choice([20, 32]),
        kv_lora_rank=draw.choice([12, 24]),
        qk_nope_head_dim=draw.choice([7, 16]),
        qk_rope_head_dim=draw.choice([4, 10]),
        v_head_dim=draw.choice([9, 16, 24]),
        n_routed_experts=experts,
        zero_expert_num=zero,
        moe_topk=draw.randint(2, min(5, experts + zero)),  # theirs fails at 1: a squeeze takes the choices' dim
        target_ffn_experts=1.0,
        expert_ffn_hidden_size=draw.choice([16, 40]),
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        rope_theta=draw.choice([1e3, 1e6]),
        max_position_embeddings=512,
        tie_word_embeddings=draw.random() < 0.3,
        num_codebooks=0,
    )


def theirs_from(folder: Path, config: LanguageConfig) -> Any:
    """Their model with the weights of our folder.

    Their own loader refuses released folders with zero experts: it allocates gate and up rows for the N + Z experts,
    of which the last Z are never read, so the tensors are placed by name here.
    """
    model = transformers.LongcatFlashForCausalLM._from_config(
        transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager"
    )
    held, source = model.state_dict(), SafetensorsFolder(folder)
    for part in weights.language_parts(config):
        into = held[part.name] if part.name in held else part.view(held[part.held])
        into.copy_(source[part.name])
    return model.float().eval()


def perturbed(config: LanguageConfig, seed: int) -> LanguageModel:
    model = LanguageModel(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 or "bias" in name:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def their_gradients(model: Any, config: LanguageConfig) -> dict[str, Tensor]:
    held = {name: p.grad for name, p in model.named_parameters()}
    out = {}
    for part in weights.language_parts(config):
        if part.name in held:
            out[part.name] = held[part.name]
        elif ".experts." in part.held:
            out[part.name] = part.view(held[part.held])
    return out


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))


@pytest.mark.parametrize("seed", range(16))
def test_logits_and_gradients_equal_transformers(tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    ours = perturbed(config, seed)
    ours.save_pretrained(tmp_path)
    theirs = theirs_from(tmp_path, config)
    # Their pad embedding (id 3) takes no gradient, ours does: ids start above it.
    ids_BT = torch.randint(4, config.vocab_size, (3, 21), generator=torch.Generator().manual_seed(seed))
    got, want = ours.logits(ids_BT), theirs(ids_BT).logits
    assert relative(got, want) < 1e-5
    target = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed))
    (got * target).sum().backward()
    (want * target).sum().backward()
    mine, reference = weights.published_gradients(ours, config), their_gradients(theirs, config)
    assert set(mine) == {part.name for part in weights.language_parts(config)} - _buffers(config)
    for name, gradient in mine.items():
        assert relative(gradient, reference[name]) < 1e-4, name


@pytest.mark.parametrize("seed", [11, 12])
def test_a_folder_written_by_transformers_is_read(tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    perturbed(config, seed).save_pretrained(tmp_path / "ours")
    theirs = theirs_from(tmp_path / "ours", config)
    theirs.save_pretrained(tmp_path / "theirs")
    again = LanguageModel.from_pretrained(tmp_path / "theirs")
    ids_BT = torch.randint(0, config.vocab_size, (2, 9))
    assert relative(again.logits(ids_BT), theirs(ids_BT).logits) < 1e-5
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["num_layers"] == config.num_layers


def _buffers(config: LanguageConfig) -> set[str]:
    return {f"model.layers.{i}.mlp.router.e_score_correction_bias" for i in range(config.num_layers)}
