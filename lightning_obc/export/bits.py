"""Integers in as few bits as they need: fixed widths, digits of any base, and sparse masks.

Everything is little-endian: bit ``i`` of a stream is bit ``i mod 8`` of byte ``i // 8``, and the lowest bit of a value
comes first.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_CHUNK = 1 << 19
_MAX_WORD = 62


def pack_words(values: Ints, width: int) -> Bytes:
    """Non-negative integers below ``2**width`` in ``width`` bits each, 0 <= width <= 62."""
    values = np.ascontiguousarray(values, dtype=np.int64)
    if width == 0 or not len(values):
        return np.zeros(0, np.uint8)
    # Chunks of a multiple of 8 values end on a byte, whatever the width.
    parts = [
        np.packbits(_as_bits(values[start : start + _CHUNK], width), bitorder="little")
        for start in range(0, len(values), _CHUNK)
    ]
    return np.concatenate(parts)


def _as_bits(values: Ints, width: int) -> Bytes:
    octets = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets[:, : -(-width // 8)], axis=1, count=width, bitorder="little")


def unpack_words(data: Bytes, width: int, count: int) -> Ints:
    """Inverse of :func:`pack_words` for ``count`` values."""
    values = np.zeros((count, 8), np.uint8)
    if width == 0 or not count:
        return values.view("<i8").reshape(-1).astype(np.int64)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        piece = data[start * width // 8 : -(-stop * width // 8)]
        entries = np.unpackbits(piece, count=(stop - start) * width, bitorder="little").reshape(-1, width)
        values[start:stop, : -(-width // 8)] = np.packbits(entries, axis=1, bitorder="little")
    return values.view("<i8").reshape(-1).astype(np.int64)


def words_size(count: int, width: int) -> int:
    """Bytes of ``count`` packed values."""
    return -(-count * width // 8)


@lru_cache(maxsize=256)
def digit_word(base: int) -> tuple[int, int]:
    """``(digits, bits)``: how many digits of a base go into one word of how many bits, with the least waste."""
    if base <= 1:
        return 1, 0
    choices = ((digits, math.ceil(digits * math.log2(base))) for digits in range(1, _MAX_WORD + 1))
    fitting = [
        (bits / digits, digits, bits) for digits, bits in choices if bits <= _MAX_WORD and base**digits <= 2**bits
    ]
    _, digits, bits = min(fitting)
    return digits, bits


def pack_digits(values: Ints, base: int) -> Bytes:
    """Integers in ``0 .. base - 1`` in about ``log2(base)`` bits each."""
    digits, bits = digit_word(base)
    padded = np.zeros(-(-len(values) // digits) * digits, np.int64)
    padded[: len(values)] = values
    powers = np.array([base**i for i in range(digits)], np.int64)
    return pack_words(padded.reshape(-1, digits) @ powers, bits)


def unpack_digits(data: Bytes, base: int, count: int) -> Ints:
    """Inverse of :func:`pack_digits` for ``count`` values."""
    digits, bits = digit_word(base)
    if bits == 0:
        return np.zeros(count, np.int64)
    words = unpack_words(data, bits, -(-count // digits))
    powers = np.array([base**i for i in range(digits)], np.int64)
    return (words[:, None] // powers % base).reshape(-1)[:count]


def digits_size(count: int, base: int) -> int:
    """Bytes of ``count`` packed digits."""
    digits, bits = digit_word(base)
    return words_size(-(-count // digits), bits)


@lru_cache(maxsize=16)
def _supports(n: int, m: int) -> tuple[NDArray[np.bool_], Ints]:
    """All masks with ``n`` of ``m`` set, in lexicographic order of positions, and each mask's rank by its bits."""
    masks = np.zeros((math.comb(m, n), m), np.bool_)
    for rank, positions in enumerate(combinations(range(m), n)):
        masks[rank, list(positions)] = True
    ranks = np.zeros(2**m, np.int64)
    ranks[masks @ (1 << np.arange(m))] = np.arange(len(masks))
    return masks, ranks


def rank_groups(mask: NDArray[np.bool_], n: int, m: int) -> Ints:
    """Rank of every group of ``m`` entries among the masks with exactly ``n`` set."""
    return _supports(n, m)[1][mask.reshape(-1, m) @ (1 << np.arange(m))]


def unrank_groups(ranks: Ints, n: int, m: int) -> NDArray[np.bool_]:
    """Inverse of :func:`rank_groups`, flat."""
    return _supports(n, m)[0][ranks].reshape(-1)


def split_gaps(mask: NDArray[np.bool_], divisor: int) -> tuple[Bytes, Ints]:
    """Golomb code of the gaps before every set entry: quotients in unary as one bit stream, and the remainders."""
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    ends = np.cumsum(gaps // divisor + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    return np.packbits(unary, bitorder="little"), gaps % divisor


def join_gaps(unary: Bytes, remainders: Ints, divisor: int, size: int) -> NDArray[np.bool_]:
    """Inverse of :func:`split_gaps` for a mask of ``size`` entries."""
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    gaps = (np.diff(ends, prepend=-1) - 1) * divisor + remainders
    mask = np.zeros(size, np.bool_)
    mask[np.cumsum(gaps + 1) - 1] = True
    return mask


def gaps_size(mask: NDArray[np.bool_], divisor: int) -> int:
    """Bytes of :func:`split_gaps` with its remainders packed as digits."""
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    return words_size(int((gaps // divisor).sum()) + len(gaps), 1) + digits_size(len(gaps), divisor)


def best_divisor(mask: NDArray[np.bool_]) -> int:
    """The divisor with the smallest Golomb code, searched around the optimum for independent entries."""
    density = mask.mean()
    if not 0 < density < 1:
        return 1
    guess = max(1, round(-1 / math.log2(1 - density)))
    return min({max(1, guess + step) for step in (-1, 0, 1)}, key=lambda divisor: gaps_size(mask, divisor))


def entropy_bits(density: float) -> float:
    """Binary entropy of an entry that is set with probability ``density``, in bits."""
    if density <= 0 or density >= 1:
        return 0.0
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)
