"""Text to ids: a byte-level BPE with the reserved ids of networks.md section 5, or any Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from omni_ray.types.errors import DataError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
AUDIO_BEGIN_ID, AUDIO_END_ID, AUDIO_PAD_ID, PAUSE_ID = 4, 5, 6, 7
IMAGE_PAD_ID, VIDEO_MARK_ID = 12, 13
NUM_RESERVED = 16
"""Ids below this are reserved in tokenizers that this project learns."""

RESERVED: tuple[str, ...] = (
    "<unk>",
    "<longcat_s>",
    "</longcat_s>",
    "<longcat_pad>",
    "<|audio|>",
    "<|/audio|>",
    "<|audio_pad|>",
    "</pause>",
    "<begin-of-system>",
    "<begin-of-user>",
    "<begin-of-assistant>",
    "<begin-of-voice-assistant>",
    "<|image_pad|>",
    "<image>",
    "<reserved_14>",
    "<reserved_15>",
)
"""Names of ids 0..15 (source: networks.md section 5)."""

_SHORT, _REMEMBERED = 32, 4096
"""Texts of so many characters, and how many of them are kept: roles, newlines and times come in every sample."""
_FIRST_MASK = 110
# The published tokenizer keeps the ten tokens in slots <mask_110>..<mask_119>, in this order.
_MASK_NAMES = {name: f"<mask_{_FIRST_MASK + i}>" for i, name in enumerate(RESERVED[4:14])}
_OTHER_NAMES = {
    "<unk>": ("[UNK]",),
    "<longcat_s>": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "</longcat_s>": ("</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "[SEP]"),
    "<longcat_pad>": ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>"),
}
# Words of the chat template stay whole; a word takes the space before it; digits stand alone.
_PIECES = (
    r"second\{\d+\.\d\}:|VOICE ASSISTANT:|ASSISTANT:|SYSTEM:|USER:"
    r"| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back; special ids by name.

    Text given to :meth:`encode` is only text: the name of a special token in it is spelt out in ordinary ids, so that
    a user cannot forge a role or a placeholder.
    """

    def __init__(self, inner: hf.Tokenizer) -> None:
        self._inner = inner
        self._inner.encode_special_tokens = True
        self._special = {name: self._find(name) for name in RESERVED[:14]}
        self._short = lru_cache(maxsize=_REMEMBERED)(self._ids)

    @staticmethod
    def learn(texts: Iterable[str], max_size: int = 1024) -> Tokenizer:
        """Learn a byte-level BPE from texts; equal texts give equal bytes.

        Args:
            max_size: Most entries: 16 reserved, 256 bytes, then merges.
        """
        if max_size < NUM_RESERVED + 256:
            raise DataError(f"a byte-level vocabulary needs at least {NUM_RESERVED + 256} entries, not {max_size}")
        inner = hf.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(hf.Regex(_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=max_size,
            show_progress=False,
            special_tokens=list(RESERVED),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(texts, trainer)
        return Tokenizer(inner)

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """Read a tokenizer.json, this project's or another's.

        Raises:
            DataError: the file is missing or is no tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return Tokenizer(hf.Tokenizer.from_str(text))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; name a tokenizer.json") from error
        except Exception as error:  # the library raises plain Exception for text it cannot read
            raise DataError(f"{path} is not a tokenizer.json: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json (UTF-8)."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self._inner.to_str(pretty=True))

    def __len__(self) -> int:
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _from_json, (self._inner.to_str(),)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no special token is added or recognised."""
        return list(self._short(text) if len(text) <= _SHORT else self._ids(text))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and placeholders leave no trace."""
        special = set(self.special_ids)
        return str(self._inner.decode([int(i) for i in ids if int(i) not in special], skip_special_tokens=True))

    def id_of(self, name: str) -> int:
        """Id of a special token by its name in :data:`RESERVED` (the published slot names are known too).

        Raises:
            DataError: the loaded tokenizer has no such token.
        """
        found = self._special.get(name)
        if found is None:
            known = (name, *filter(None, [_MASK_NAMES.get(name)]), *_OTHER_NAMES.get(name, ()))
            raise DataError(f"the tokenizer has no {name}; it would be one of {', '.join(known)}")
        return found

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Every special id, ascending: what a sampler masks and a reader never sees."""
        added = self._inner.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        return tuple(sorted(special | {i for i in self._special.values() if i is not None}))

    @property
    def bos_id(self) -> int:
        """``<longcat_s>``."""
        return self.id_of("<longcat_s>")

    @property
    def eos_id(self) -> int:
        """``</longcat_s>``."""
        return self.id_of("</longcat_s>")

    @property
    def pad_id(self) -> int:
        """Text pad, beside codec rows as well."""
        return self.id_of("<longcat_pad>")

    @property
    def pause_id(self) -> int:
        """``</pause>``: last text token of a speech segment that another follows."""
        return self.id_of("</pause>")

    @property
    def audio_begin_id(self) -> int:
        """``<|audio|>``."""
        return self.id_of("<|audio|>")

    @property
    def audio_end_id(self) -> int:
        """``<|/audio|>``."""
        return self.id_of("<|/audio|>")

    @property
    def audio_pad_id(self) -> int:
        """``<|audio_pad|>``: a row that an audio feature fills."""
        return self.id_of("<|audio_pad|>")

    @property
    def image_pad_id(self) -> int:
        """``<|image_pad|>``: a row that a visual feature fills."""
        return self.id_of("<|image_pad|>")

    def _find(self, name: str) -> int | None:
        for candidate in (name, _MASK_NAMES.get(name), *_OTHER_NAMES.get(name, ())):
            found = None if candidate is None else self._inner.token_to_id(candidate)
            if found is not None:
                return int(found)
        return None


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(hf.Tokenizer.from_str(text))
