"""Recipes: overrides, and refusals that name the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_ray.config.load import check_recipe, load_recipe, save_recipe
from omni_ray.types.errors import ConfigError

REFUSED = {
    "pools.vision.actor=2": "unknown key 'pools.vision.actor'; the nearest known key is 'actors'",
    "stagez=1": "unknown key 'stagez'; the nearest known key is 'stages'",
    "stages.0.lr.peek=1": "unknown key 'stages.0.lr.peek'; the nearest known key is 'peak'",
    "pools.language.cp=2": "pools.language.actors is 1, yet dp x cp x pp is 1 x 2 x 1; set actors to their product",
    "pools.language.backend=deepspeed": "pools.language.backend is deepspeed and schedule.reduce is ordered; choose "
    "fast, or pools.language.backend native",
    "pools.speech.precision=bf16": "pools.speech.precision is bf16, yet the codec's ids are made in fp32; choose fp32",
    "serving.pools.audio.resources.gpu=0.5": "serving.pools.audio.resources.gpu is 0.5, which is not built yet",
    "pools.vision.shard=hsdp": "pools.vision.shard is hsdp with recompute none: graphs that wait for their backward",
    "pools.vision.shard=zero3": "pools.vision.shard is zero3 with recompute none: graphs that wait for their backward",
    "pools.speech.shard=zero1": "pools.speech has shard zero1 and offload none, yet the codec does not train",
    "pools.speech.offload=cpu": "pools.speech has shard none and offload cpu, yet the codec does not train",
    "schedule.reduce=quick": "schedule.reduce is 'quick'; input should be 'ordered' or 'fast'",
    "schedule.window=0": "schedule.window is 0; input should be greater than 0",
    "pools.vision.recompute=selective": "pools.vision.recompute is selective, which the language pool alone has",
    "seed": "--set 'seed' is not of the form a.b=value",
    "stages.S9.steps=1": "'S9' is neither a name nor a number below",
    "stages.S0.mixture={nothing: 1}": "stage S0 draws from 'nothing', which data.sources lacks",
}


UNDER_DEEPSPEED = {
    "shard=hsdp": "pools.language.shard is hsdp; choose zero1, zero2 or zero3",
    "actors=1": "pools.language.actors is 1; choose at least 2: there is nothing to share, or native",
    "precision=bf16": "pools.language.precision is bf16; choose fp32, or native",
    "offload=cpu": "pools.language.offload is cpu; choose none, or native",
    "resources.gpu=1": "pools.language.resources.gpu is 1.0; choose 0, or native",
}


@pytest.mark.parametrize("word", UNDER_DEEPSPEED)
def test_what_deepspeed_cannot_go_with_is_refused(word: str) -> None:
    words = ["backend=deepspeed", "shard=zero2", "actors=2"]
    fits = ["schedule.reduce=fast", *(f"pools.language.{given}" for given in words)]
    assert load_recipe("tiny", fits).pools.for_serving().language.backend == "native"
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [*fits, f"pools.language.{word}"])
    assert f"pools.language.backend is deepspeed and {UNDER_DEEPSPEED[word]}" in str(caught.value)


@pytest.mark.parametrize("word", REFUSED)
def test_refusals_name_the_thing_and_the_mend(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [word])
    assert REFUSED[word] in str(caught.value)


def test_colocated_encoders_stand_on_every_device() -> None:
    sizes = ["pools.vision.actors=4", "pools.audio.actors=4", "pools.language.actors=2"]
    assert load_recipe("tiny", ["placement=colocate", *sizes]).inner_dp == 2
    assert load_recipe("tiny", sizes).inner_dp == 1
    with pytest.raises(ConfigError, match="placement is colocate with vision 3, audio 4 and language 2 actors; enc"):
        load_recipe("tiny", ["placement=colocate", *sizes, "pools.vision.actors=3"])


def test_shares_need_ordered_sums() -> None:
    sharded = ["pools.vision.shard=hsdp", "pools.vision.recompute=full"]
    assert load_recipe("tiny", sharded).pools.vision.shard == "hsdp"
    with pytest.raises(ConfigError, match=r"pools\.vision\.shard is hsdp, which has ordered sums alone; choose"):
        load_recipe("tiny", [*sharded, "schedule.reduce=fast"])


def test_a_measured_mixture_needs_whole_networks() -> None:
    raw = load_recipe("tiny", ["pools.vision.shard=hsdp", "pools.vision.recompute=full"]).model_dump(mode="json")
    raw["stages"] = [
        raw["stages"][0] | {"mixture": {"blend": [{"source": "text", "weight": 1}], "gap": {}, "take": {"samples": 4}}}
    ]
    assert check_recipe(raw).pools.vision.actors == 1
    raw["pools"]["vision"]["actors"] = 2
    with pytest.raises(
        ConfigError, match=r"measures its mixture \(gap\) between steps, when pools\.vision with shard hsdp"
    ):
        check_recipe(raw)


def test_overrides_reach_their_place() -> None:
    recipe = load_recipe("tiny", ["pools.vision.actors=2", "stages.S0.steps=10", "stages.0.lr.peak=1e-4", "seed=7"])
    assert (recipe.pools.vision.actors, recipe.stages[0].steps, recipe.stages[0].lr.peak, recipe.seed) == (
        2,
        10,
        1e-4,
        7,
    )


def test_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_pool_sizes_do_not_change_the_numbers_fingerprint() -> None:
    base = load_recipe("tiny").numbers_fingerprint()
    assert load_recipe("tiny", ["pools.vision.actors=3", "schedule.num_chunks=4"]).numbers_fingerprint() == base
    assert load_recipe("tiny", ["seed=1"]).numbers_fingerprint() != base


def test_precision_changes_the_numbers_fingerprint() -> None:
    """A run in fp32 keeps the one that it had before there was a choice."""
    prints = {
        words: load_recipe("tiny", list(words)).numbers_fingerprint()
        for words in (
            (),
            ("pools.vision.precision=bf16",),
            ("pools.audio.precision=bf16",),
            ("pools.vision.precision=fp32",),
        )
    }
    assert len(set(prints.values())) == 3
    assert prints[()] == prints["pools.vision.precision=fp32",]
    sharded = ["pools.vision.shard=hsdp", "pools.vision.recompute=full"]
    recipe = load_recipe("tiny", ["pools.vision.precision=bf16", "pools.vision.actors=3", *sharded])
    assert recipe.pools.for_serving().vision.shard == "none"
    assert recipe.pools.for_serving().vision.precision == "fp32"
    assert recipe.pools.for_serving().vision.actors == 3


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean the preset 'tiny'"):
        load_recipe("tinny")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(str(bad))
    bad.write_text("- 1")
    with pytest.raises(ConfigError, match="a mapping of settings is needed"):
        load_recipe(str(bad))
