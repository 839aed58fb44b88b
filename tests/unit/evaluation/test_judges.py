"""Judges: grammars, word counts, and that they hear real speech and tell it from noise."""

from __future__ import annotations

import numpy as np
import pytest

from omni_ray.evaluation.judges import (
    Grammar,
    GrammarJudge,
    judge_clips,
    levelled,
    spelt_out,
    words_right,
)
from omni_ray.types.errors import ConfigError, DataError

PAIR = Grammar(slots=(("red", "blue", "purple"), ("one", "five", "seven")))


def test_a_grammar_says_its_words_and_its_chance() -> None:
    grammar = Grammar(slots=(("red", "blue"), ("one", "two", "three", "four")))
    assert "public <words> = ( red | blue ) ( one | two | three | four );" in grammar.jsgf()
    assert grammar.chance() == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert "( up | down )+;" in Grammar(slots=(("up", "down"),), loop=True).jsgf()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(slots=((),)), "each needs at least one word"),
        (Grammar(slots=()), "each needs at least one word"),
        (Grammar(slots=(("a",), ("b",)), loop=True), "a looping grammar has 2 slots; give one"),
        (Grammar(slots=(("red;",),)), "grammar word 'red;' is not lower-case letters"),
    ],
)
def test_grammars_that_cannot_be(grammar: Grammar, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grammar.jsgf()


@pytest.mark.parametrize(
    ("said", "heard", "right"),
    [
        ("red seven", "red seven", 2),
        ("red seven", "blue seven", 1),
        ("red seven", "", 0),
        ("red seven", "seven red", 1),
        ("it is a red seven", "it is red seven", 4),
        ("red seven", "the red big seven", 2),
        ("", "red", 0),
    ],
)
def test_words_right(said: str, heard: str, right: int) -> None:
    assert words_right(said.split(), heard.split()) == right


def test_transcripts_are_spelt_out() -> None:
    assert spelt_out(" Red 7. What color?") == ("red", "seven", "what", "colour")


def test_clips_are_levelled_and_set_in_quiet() -> None:
    wave_S = np.full(2400, 0.01, dtype=np.float32)
    level_S = levelled(wave_S, 24000)
    assert len(level_S) == 1600 + 2 * 4000
    assert level_S.max() == pytest.approx(0.7, abs=0.1)
    assert not levelled(np.zeros(100, dtype=np.float32), 16000).any()


def test_the_grammar_judge_hears_words_the_same_in_any_order() -> None:
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("hibari")
    from omni_ray.data.tiny_world.speech import speak

    judge = GrammarJudge(PAIR)
    texts = ["red five", "purple one", "blue seven"]
    clips = [speak(text) for text in texts]
    score = judge_clips(judge, clips, [text.split() for text in texts])
    assert (score.words, score.heard, score.clips, score.exact) == (6, 6, 3, 3)
    assert (score.accuracy, score.exact_share) == (1.0, 1.0)
    wrong = judge_clips(judge, clips, [("blue", "one"), ("red", "seven"), ("purple", "five")])
    assert wrong.heard == 0
    assert [judge.hear(*clip) for clip in reversed(clips)] == [tuple(text.split()) for text in reversed(texts)]


def test_british_spellings_are_known_and_other_unknown_words_refused() -> None:
    pytest.importorskip("pocketsphinx")
    GrammarJudge(Grammar(slots=(("colour", "digit"),)))
    with pytest.raises(DataError, match="the recogniser's dictionary has no word 'qqxz'"):
        GrammarJudge(Grammar(slots=(("qqxz",),)))
