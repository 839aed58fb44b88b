"""Shuffling by arithmetic: where draw number n of a stream lies, without a list of what was drawn.

A pass over a stream is one permutation of its numbers, another at every pass. Streams of up to :data:`TABLE_LIMIT`
samples keep the permutation as a table; longer ones compute each place by a keyed Feistel network over the rectangle
``rows x columns`` that just covers the stream, walking on while a place falls outside (source: Black and Rogaway,
"Ciphers with arbitrary finite domains", generalised Feistel with cycle walking). Memory does not grow with the size.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

TABLE_LIMIT = 65_536
"""Most samples of a stream whose permutation is a table (half a MiB)."""
ROUNDS = 6
_MASK = (1 << 64) - 1


def place(seed: int, stream: str, size: int, number: int) -> int:
    """Which sample draw ``number`` of a stream is: place ``number % size`` of pass ``number // size``.

    Args:
        seed: The recipe's seed.  stream: Its name, so that streams of one size differ.  size: Samples, at least 1.
        number: Draws of this stream before this one, from 0.
    """
    turn, inside = divmod(number, size)
    if size <= TABLE_LIMIT:
        return int(_table(seed, stream, size, turn)[inside])
    return walk(_keys(seed, stream, turn), size, inside)


def walk(keys: tuple[int, ...], size: int, inside: int) -> int:
    """The keyed permutation of 0..size-1 at ``inside``; a rectangle's excess is at most a row, so it walks rarely."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(inside, columns)
        for turn, key in enumerate(keys):
            if turn % 2 == 0:
                row = (row + _mixed(column, key)) % rows
            else:
                column = (column + _mixed(row, key)) % columns
        inside = row * columns + column
        if inside < size:
            return inside


def _mixed(value: int, key: int) -> int:
    """64 well-mixed bits of a value under a key (the finaliser of SplitMix64)."""
    value = (value + key) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=256)
def _keys(seed: int, stream: str, turn: int) -> tuple[int, ...]:
    digest = hashlib.sha512(f"{seed}/{stream}/{turn}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


@lru_cache(maxsize=64)
def _table(seed: int, stream: str, size: int, turn: int) -> NDArray[np.int64]:
    digest = hashlib.sha256(f"{seed}/{stream}/{turn}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)
