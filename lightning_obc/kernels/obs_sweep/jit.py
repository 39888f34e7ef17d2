"""How the sweep's functions are compiled, and cached on disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

# Reassociation and contraction are harmless; NaN and Inf keep their meaning, so that broken pivots are seen. Callers
# own all memory, so that reference counts, which cost more than the arithmetic of a step, are left out (``_nrt``).
STRICT: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
    "nogil": True,
    "_nrt": False,
}


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, and keep the machine code on disk where there is a place to write it."""
    return cached_as(function, STRICT)


def cached_as(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """:func:`cached` with options of ``numba.njit`` other than :data:`STRICT`."""
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


def source_digest(*files: str) -> int:
    """A non-negative checksum of all sources beside these files. numba itself looks at the cached function's file."""
    total = 0
    for folder in sorted({Path(file).parent for file in files}):
        for source in sorted(folder.glob("*.py")):
            try:
                total = zlib.crc32(source.read_bytes(), total)
            except OSError:
                continue
    return total


@numba.njit(**STRICT)
def finite(values: NDArray[Any]) -> bool:
    """True when a line holds neither NaN nor Inf."""
    good = True
    for k in range(len(values)):
        good &= np.isfinite(values[k])
    return good


def _lower(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The smaller of two numbers, neither of them NaN. Unlike ``min`` it does not keep loops from being vectorised."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = context.get_value_type(a)
        name = f"llvm.minnum.f{a.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind]), name)
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return (a(a, a), codegen) if a == b and isinstance(a, types.Float) else None


lower: Any = intrinsic(_lower)


STRIP = 16


def make_strip(target_ld: int, source_ld: int) -> Any:
    """An intrinsic ``f(target, target_at, source, source_at)`` that copies ``STRIP`` elements at fixed distances.

    Unrolled, because what a loop around a load and a store adds takes longer than they do.
    """

    def strip(typingctx, target, target_at, source, source_at):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            into, out_of = (
                builder.gep(make_array(signature.args[k])(context, builder, args[k]).data, [args[k + 1]])
                for k in (0, 2)
            )
            for k in range(STRIP):
                place = builder.gep(out_of, [ir.Constant(ir.IntType(64), k * source_ld)])
                value = builder.load_atomic(place, "unordered", source.dtype.bitwidth // 8)
                builder.store(value, builder.gep(into, [ir.Constant(ir.IntType(64), k * target_ld)]))
            return context.get_dummy_value()

        return types.void(target, types.intp, source, types.intp), codegen

    return intrinsic(strip)


def aligned(size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Uninitialised memory that starts at a cache line, so that no tile straddles one."""
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)
