"""Reserved ids, whole words, and text that stays text."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers as hf

from omni_ray.data.tiny_world.corpus import QUESTIONS, knowledge, template_texts
from omni_ray.data.tiny_world.words import all_words
from omni_ray.data.tokenizer import AUDIO_PAD_ID, EOS_ID, IMAGE_PAD_ID, PAD_ID, RESERVED, Tokenizer
from omni_ray.types.errors import DataError

_LEARN = (
    "import hashlib; from omni_ray.data.tokenizer import Tokenizer;"
    "from omni_ray.data.tiny_world.corpus import template_texts;"
    "print(hashlib.sha256(Tokenizer.learn(template_texts()).to_json().encode()).hexdigest())"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.learn(template_texts())


def test_reserved_ids_are_the_published_ones(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_of(name) for name in RESERVED[:14]] == list(range(14))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, EOS_ID, PAD_ID) == (1, 2, 3)
    ends = (tokenizer.audio_begin_id, tokenizer.audio_end_id, tokenizer.audio_pad_id, tokenizer.pause_id)
    assert (*ends, tokenizer.image_pad_id) == (4, 5, AUDIO_PAD_ID, 7, IMAGE_PAD_ID)
    assert tokenizer.special_ids == tuple(range(16))
    assert 272 < len(tokenizer) <= 1024


@pytest.mark.parametrize(
    "piece", ["USER:", "ASSISTANT:", "VOICE ASSISTANT:", "\n", ":", "second{3.0}:", "second{1.5}:"]
)
def test_the_template_is_short(tokenizer: Tokenizer, piece: str) -> None:
    assert len(tokenizer.encode(piece)) == 1


def test_every_word_of_the_world_is_one_token(tokenizer: Tokenizer) -> None:
    for word in all_words():
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(f" {word}")) == 1
    asked = [wording for wordings in QUESTIONS.values() for wording in wordings] + [q for q, _ in knowledge()]
    assert all(len(tokenizer.encode(text)) == len(text.split()) for text in asked)


@pytest.mark.parametrize(
    "text", ["naïve 東京 \U0001f642", "line\n\n\tend ", "second{9.7}: 42", "", "USER:x\nASSISTANT:"]
)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_special_name_in_text_is_only_text(tokenizer: Tokenizer) -> None:
    forged = tokenizer.encode("</longcat_s><|image_pad|>hello")
    assert min(forged) >= 16
    assert tokenizer.decode([1, *forged, 2, 3, 6]) == "</longcat_s><|image_pad|>hello"


def test_saved_pickled_and_learnt_again_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("which digit is it <unk>") == tokenizer.encode("which digit is it <unk>")
        assert other.to_json() == tokenizer.to_json()
    runs = {
        subprocess.run([sys.executable, "-c", _LEARN], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_another_tokenizer_is_known_by_its_names(tmp_path: Path) -> None:
    inner = hf.Tokenizer(hf.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    inner.add_special_tokens(["<s>", "</s>", "<pad>", "<mask_110>", "<mask_118>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    other = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (other.bos_id, other.eos_id, other.pad_id, other.audio_begin_id, other.image_pad_id) == (2, 3, 4, 5, 6)
    with pytest.raises(DataError, match=r"no <\|audio_pad\|>; it would be one of <\|audio_pad\|>, <mask_112>"):
        _ = other.audio_pad_id


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json is not a tokenizer.json"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(DataError, match="at least 272 entries, not 100"):
        Tokenizer.learn(["x"], max_size=100)
