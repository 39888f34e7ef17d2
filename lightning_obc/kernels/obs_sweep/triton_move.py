"""The Triton kernel that compacts ``G`` between panels. Index legend as in :mod:`.triton_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "size", "holes"])
def move_kernel(
    source: tl.tensor,  # [n, ·, source_line]
    source_stride: tl.tensor,
    source_line: tl.tensor,
    owner: tl.tensor,  # [P] int64
    target: tl.tensor,  # [P, ·, target_line]
    target_stride: tl.tensor,
    target_line: tl.tensor,
    hole: tl.tensor,  # [P, holes] int64, lines to write; those of size or more are left out
    origin: tl.tensor,  # [P, width] int64, the slot of the source that each slot of the target takes
    rows: tl.tensor,
    size: tl.tensor,
    holes: tl.tensor,
    width: tl.tensor,
    MIRROR: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """``target[h, j] = source[origin[h], origin[j]]`` for the holes ``h`` and all ``j < size``.

    With ``MIRROR``, source and target are one symmetric matrix, compacted in place, and ``target[j, h]`` is written too
    where ``j`` is no hole itself. Nothing is read that another program writes: an origin that differs from its slot is
    at ``size`` or beyond.
    """
    here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    k = tl.program_id(1) * LINES + tl.arange(0, LINES)[None, :]
    h = tl.load(hole + here * holes + k, mask=(here < rows) & (k < holes), other=1 << 40)
    moves = h < size
    s = tl.load(origin + here * width + h, mask=moves, other=0)
    matrix = tl.load(owner + here, mask=here < rows, other=0) * source_stride
    for first in range(0, size, COLS):
        j = first + tl.arange(0, COLS)[None, :].to(tl.int64)
        inside = (here < rows) & (j < size)
        o = tl.load(origin + here * width + j, mask=inside, other=0)
        both = moves[:, :, None] & inside[:, None, :]
        value = tl.load(source + (matrix + s * source_line)[:, :, None] + o[:, None, :], mask=both)
        at = here[:, :, None] * target_stride
        tl.store(target + at + h[:, :, None] * target_line + j[:, None, :], value, mask=both)
        if MIRROR:
            stays = both & (o == j)[:, None, :]
            tl.store(target + at + j[:, None, :] * target_line + h[:, :, None], value, mask=stays)
