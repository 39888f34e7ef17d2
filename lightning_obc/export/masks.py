"""Masks in the smallest of several forms, each described by a few numbers that go into a file's manifest.

Before coding, a mask is reduced: to one row when all rows are equal (structured sparsity), and to one entry per block
when blocks of columns are equal. Then the smallest of these kinds is taken:

``all``   nothing is stored, every entry is set
``bits``  one bit per entry
``nm``    exactly ``n`` of every ``m`` entries are set; the rank of each group among the ``C(m, n)`` possible ones
``gaps``  Golomb code of the gaps between set (or, ``inverted``, unset) entries; near the entropy for random masks
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_obc.export import bits

Mask = NDArray[np.bool_]
_BLOCKS = (16, 8, 4, 2)
_GROUPS = (4, 8, 2, 16)


def encode_mask(mask: Mask) -> tuple[dict[str, Any], dict[str, bits.Bytes]]:
    """Description and byte streams of a ``[g, R, d]`` mask."""
    shared = mask.shape[1] > 1 and bool((mask == mask[:, :1]).all())
    reduced = mask[:, :1] if shared else mask
    block = next((size for size in _BLOCKS if _uniform(reduced, size)), 1)
    flat = reduced[..., ::block].reshape(-1)
    description: dict[str, Any] = {"shared": shared, "block": block}
    if flat.all():
        return description | {"kind": "all"}, {}
    candidates = [_bits(flat), _gaps(flat, False), _gaps(flat, True)]
    row = reduced.shape[-1] // block
    candidates += [coded for m in _GROUPS if row % m == 0 and (coded := _groups(flat, m)) is not None]
    kind, streams = min(candidates, key=lambda candidate: sum(map(len, candidate[1].values())))
    return description | kind, streams


def decode_mask(description: dict[str, Any], streams: dict[str, bits.Bytes], shape: tuple[int, ...]) -> Mask:
    """Inverse of :func:`encode_mask`."""
    block = int(description["block"])
    reduced = (shape[0], 1 if description["shared"] else shape[1], shape[2] // block)
    size = int(np.prod(reduced))
    kind = description["kind"]
    if kind == "all":
        flat = np.ones(size, np.bool_)
    elif kind == "bits":
        flat = bits.unpack_words(streams["mask"], 1, size).astype(np.bool_)
    elif kind == "nm":
        n, m = int(description["n"]), int(description["m"])
        count = math.comb(m, n)
        flat = bits.unrank_groups(bits.unpack_digits(streams["mask"], count, size // m), n, m)
    else:
        divisor = int(description["divisor"])
        remainders = bits.unpack_digits(streams["mask_remainders"], divisor, int(description["count"]))
        flat = bits.join_gaps(streams["mask"], remainders, divisor, size) != bool(description["inverted"])
    return np.broadcast_to(flat.reshape(reduced).repeat(block, -1), shape).copy()


def _uniform(mask: Mask, block: int) -> bool:
    if mask.shape[-1] % block:
        return False
    blocks = mask.reshape(*mask.shape[:-1], -1, block)
    return bool((blocks == blocks[..., :1]).all())


def _bits(flat: Mask) -> tuple[dict[str, Any], dict[str, bits.Bytes]]:
    return {"kind": "bits"}, {"mask": np.packbits(flat, bitorder="little")}


def _gaps(flat: Mask, inverted: bool) -> tuple[dict[str, Any], dict[str, bits.Bytes]]:
    entries = flat != inverted
    divisor = bits.best_divisor(entries)
    unary, remainders = bits.split_gaps(entries, divisor)
    description = {"kind": "gaps", "divisor": divisor, "count": len(remainders), "inverted": inverted}
    return description, {"mask": unary, "mask_remainders": bits.pack_digits(remainders, divisor)}


def _groups(flat: Mask, m: int) -> tuple[dict[str, Any], dict[str, bits.Bytes]] | None:
    counts = flat.reshape(-1, m).sum(1)
    n = int(counts[0])
    if not 0 < n < m or not bool((counts == n).all()):
        return None
    ranks = bits.rank_groups(flat, n, m)
    return {"kind": "nm", "n": n, "m": m}, {"mask": bits.pack_digits(ranks, math.comb(m, n))}
