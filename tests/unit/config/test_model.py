"""Language sizes that cannot be are refused with the field, the value and the mend."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from omni_ray.config.model import LanguageConfig

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"moe_topk": 13, "n_routed_experts": 8, "zero_expert_num": 4}, "moe_topk is 13, yet 12 experts exist; choose 1"),
    ({"target_ffn_experts": 13.0}, "target_ffn_experts is 13.0, above moe_topk 12; lower it"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; RoPE rotates pairs, so make it even"),
    ({"num_codebooks": 3}, "num_codebooks is 3; the codec has 4"),
    ({"mtp_layers": 2}, "mtp_layers is 2; the published head has one layer, choose 0 or 1"),
    ({"vocab_size": 3}, "pad_token_id is 3, yet vocab_size is 3; choose an id below it"),
]


@pytest.mark.parametrize(("sizes", "text"), IMPOSSIBLE, ids=lambda value: str(value)[:30])
def test_contradictions_are_named(sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        LanguageConfig(**sizes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("v_head_dim", 0),
        ("num_attention_heads", -1),
        ("qk_nope_head_dim", 1.5),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", float("nan")),
        ("hidden_sise", 64),
    ],
)
def test_values_that_are_no_sizes_are_named(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        LanguageConfig(**{name: value})
