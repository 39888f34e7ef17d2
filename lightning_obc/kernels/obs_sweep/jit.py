"""How the sweep's functions are compiled, and cached on disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

# Reassociation and contraction are harmless; NaN and Inf keep their meaning, so that broken pivots are seen.
STRICT: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "error_model": "numpy",
    "nogil": True,
}


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, and keep the machine code on disk where there is a place to write it."""
    try:
        return numba.njit(cache=True, **STRICT)(function)
    except RuntimeError:
        return numba.njit(**STRICT)(function)


def source_digest(*files: str) -> int:
    """A non-negative checksum of sources. numba itself only looks at the file of the function it caches."""
    total = 0
    for file in files:
        try:
            total = zlib.crc32(Path(file).read_bytes(), total)
        except OSError:
            continue
    return total
