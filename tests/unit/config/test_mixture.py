"""The language of mixtures: both forms, values over steps in closed form, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from omni_ray.config.load import load_recipe
from omni_ray.config.mixture import Mixture, StepValue
from omni_ray.types.errors import ConfigError

VALUES = {
    "constant": 0.3,
    "line": {"linear": [[2, 1.0], [7, 4.0], [9, 0.5]]},
    "one-knot": {"linear": [[4, 2.0]]},
    "steps": {"piecewise": [[0, 1.0], [5, 2.5], [6, 0.0]]},
}
NESTED: dict[str, Any] = {
    "modalities": {
        "text": {"share": 2, "blend": [{"source": "text"}]},
        "vision": {
            "share": {"linear": [[0, 1], [100, 2]]},
            "blend": [
                {"source": "picture", "weight": 3},
                {"name": "films", "weight": 1, "blend": [{"source": "video", "repeat": 2}, {"source": "scene"}]},
            ],
        },
    },
    "take": {"rows": 4096},
}


@pytest.mark.parametrize("form", VALUES)
def test_sums_are_the_sums_of_the_values(form: str) -> None:
    value = StepValue.model_validate(VALUES[form])
    for steps in range(15):
        assert value.total(steps) == sum((value.at(k) for k in range(steps)), Fraction(0))
    assert StepValue.model_validate(value.model_dump(mode="json")) == value


def test_lines_and_steps() -> None:
    line, steps = (StepValue.model_validate(VALUES[form]) for form in ("line", "steps"))
    assert [float(line.at(k)) for k in (0, 2, 3, 7, 8, 9, 50)] == [1, 1, 1.6, 4, 2.25, 0.5, 0.5]
    assert [float(steps.at(k)) for k in (0, 4, 5, 6, 50)] == [1, 1, 2.5, 0, 0]


def test_plain_and_nested_read_back_as_written() -> None:
    plain = Mixture.model_validate({"text": 16, "speech_text": VALUES["steps"]})
    assert plain.model_dump(mode="json") == {"text": 16.0, "speech_text": VALUES["steps"]}
    nested = Mixture.model_validate(NESTED)
    assert Mixture.model_validate(nested.model_dump(mode="json")) == nested
    assert nested.sources == ("text", "picture", "video", "scene")
    assert plain.sources == ("text", "speech_text")


REFUSED = {
    "{text: x}": "mixture.counts.text.constant is 'x'; input should be a valid number",
    "{text: 0}": "source 'text' has the count 0 at every step; leave it out",
    "{text: {linear: [[3, 1], [2, 2]]}}": "knot 2 follows knot 3; steps must rise",
    "{text: {piecewise: [[3, 1]]}}": "a piecewise value starts at step 3; it must start at step 0",
    "{text: {linear: [[0, 1]], constant: 3}}": "a value is a number, or one of {linear",
    "{blend: [{source: text, wieght: 2}], take: {rows: 9}}": "unknown key 'stages.1.mixture.blend.0.wieght'; the "
    "nearest known key is 'weight'",
    "{blend: [{source: text, weight: 2}, {source: picture, repeat: 2}], take: {rows: 9}}": "'picture' says repeat or "
    "choose and 'text' beside it weight or proportion; put one of them into a blend of its own",
    "{blend: [{source: text, weight: 2, repeat: 2}], take: {rows: 9}}": "branch 'text' has weight and repeat; one word",
    "{blend: [{weight: 2}], take: {rows: 9}}": "a branch names either a source or a blend",
    "{blend: [{source: text, part: [0.5, 0.5]}], take: {rows: 9}}": "branch 'text' takes part [0.5, 0.5]; name",
    "{blend: [{source: text}, {blend: [{source: picture, weight: 1}]}], take: {rows: 9}}": "blend 'picture' of shares "
    "has no length of its own; give it weight or choose",
    "{blend: [{source: text, weight: 0}], take: {rows: 9}}": "every branch beside 'text' has weight 0",
    "{blend: [{source: text}]}": "stage S1 does not say how much a step takes; add mixture.take or a packing",
    "{blend: [{source: text}], take: {rows: 9, cost: 2}}": "take is one of {samples: N}, {rows: N}, {cost: N}",
    "{blend: [{source: nothing}], take: {rows: 9}}": "stage S1 draws from 'nothing', which data.sources lacks",
    "{}": "stage S1 has an empty mixture; name at least one source",
    "{blend: [{source: text, weight: 1}, {source: text, weight: 2}], take: {rows: 9}, gap: {}}": "two branches are "
    "called 'text'; gap needs a name for each",
}


@pytest.mark.parametrize("written", REFUSED)
def test_refusals_name_the_thing_and_the_mend(written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [f"stages.S1.mixture={written}"])
    assert REFUSED[written] in str(caught.value)


def test_packing_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="packs by split, which says how much a step takes; drop take"):
        load_recipe(
            "tiny",
            ["stages.S1.packing.kind=split", "stages.S1.mixture={blend: [{source: text}], take: {rows: 9}}"],
        )
    with pytest.raises(ConfigError, match="samples of up to seq_len 256 rows into sequences of 100; raise packing"):
        load_recipe("tiny", ["stages.S1.packing={kind: best_fit, budget: 100}"])
