"""The block sweep on a CPU: rows in parallel threads, each compiled and in its own cache (see :mod:`.block_rows`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_obc.kernels.host import filled, flat_rows, numpy_type, symmetric
from lightning_obc.kernels.obs_sweep import block_rows as kernel
from lightning_obc.kernels.obs_sweep.block_state import (
    LANES,
    BlockOptions,
    BlockProblem,
    BlockResult,
    BlockScratch,
)
from lightning_obc.kernels.obs_sweep.compiled import NARROW_STEPS, STEPS, shared_options
from lightning_obc.kernels.obs_sweep.jit import aligned
from lightning_obc.kernels.obs_sweep.packed import moves, pack_positions, packed_size, padded
from lightning_obc.kernels.obs_sweep.tile import BLOCK_ROWS, FLUSH_VECTORS, block_columns, flush_columns
from lightning_obc.kernels.obs_sweep.types import SweepInput, SweepOutput
from lightning_obc.kernels.threads import run_blocks

# A panel holds whole blocks.
LARGEST_BLOCK = NARROW_STEPS


def sweep(problem: SweepInput, members: Tensor, memory_budget: int) -> SweepOutput:
    """Eliminate all blocks of every row.

    Args:
        problem: Checked, on the CPU.
        members: ``[n, c]`` int64, columns of every block, -1 where a block is short; ``c <= LARGEST_BLOCK``.
        memory_budget: Bytes of working memory above inputs and outputs. One row at a time is always allowed.
    """
    groups, rows, columns = problem.weight.shape
    blocks, size = members.shape
    device = problem.weight.device
    order = filled((groups, rows, blocks), -1, torch.int32, device)
    losses = filled((groups, rows, blocks), 0, problem.weight.dtype, device)
    count = filled((groups, rows), 0, torch.int32, device)
    broken = filled((groups, rows), 0, torch.bool, device)
    source = _problem(problem, members)
    result = BlockResult(flat_rows(order), flat_rows(losses), count.view(-1).numpy(), broken.view(-1).numpy())
    width = block_columns(numpy_type(problem.weight.dtype))
    options = BlockOptions(size=size, block_width=width, **shared_options(problem.weight))
    positions, total = _places(blocks) * size, groups * rows
    each = packed_size(positions) * (problem.weight.itemsize + 8)
    threads = max(1, min(torch.get_num_threads(), total, memory_budget // max(1, each)))

    def begin() -> Callable[[int, int], None]:
        scratch = _scratch(blocks, size, columns, source.weight.dtype)
        return lambda first, last: kernel.sweep_rows(first, last, source, result, scratch, options)

    run_blocks(total, max(1, min(total // (4 * threads), 10**8 // columns**3)), threads, begin)
    return SweepOutput(order, losses, count, broken)


def _places(blocks: int) -> int:
    """Places of whole teams."""
    return -(-blocks // LANES) * LANES


def _problem(problem: SweepInput, members: Tensor) -> BlockProblem:
    blocks, size = members.shape
    columns = problem.weight.shape[2]
    filled = torch.full((_places(blocks), size), -1, dtype=torch.int64)
    filled[:blocks] = members
    # Member after member.
    column = filled.t().reshape(-1)
    real = column >= 0
    position = torch.zeros(columns, dtype=torch.int32)
    position[column[real]] = real.nonzero().flatten().to(torch.int32)
    packed = np.empty((len(problem.inverse), packed_size(len(column))), numpy_type(problem.inverse.dtype))
    for g, inverse in enumerate(symmetric(problem.inverse)):
        pack_positions(inverse, column.numpy(), packed[g])
    zeros = np.zeros((0, columns), np.bool_) if problem.keep is None else flat_rows(~problem.keep)
    hessian = symmetric(problem.hessian)
    lines = np.ascontiguousarray(members.numpy(), np.int32)
    return BlockProblem(flat_rows(problem.weight), packed, hessian, zeros, lines, position.numpy())


def _scratch(blocks: int, size: int, columns: int, dtype: np.dtype[Any]) -> BlockScratch:
    """Memory of one thread. The float64 part stays untouched, and so unallocated, until a row restarts."""
    places = _places(blocks)
    length, pairs = padded(places * size), size * (size + 1) // 2

    def floats(count: int = length) -> NDArray[Any]:
        return np.zeros(count, dtype)

    def integers(count: int = length) -> NDArray[np.int32]:
        return np.zeros(count, np.int32)

    return BlockScratch(
        packed=aligned(packed_size(length), dtype),
        panel=aligned(STEPS * length, dtype),
        packed64=aligned(packed_size(length), np.dtype(np.float64)),
        panel64=aligned(NARROW_STEPS * length, np.dtype(np.float64)),
        weight=floats(),
        alive=floats(),
        reference=floats(),
        diagonal=floats(places * pairs),
        lower=floats(pairs * LANES),
        solved=floats((size + 1) * LANES),
        score=floats(places),
        penalty=floats(places),
        best=floats(places // LANES),
        right=np.zeros(length),
        unit=np.zeros(length),
        moved=np.zeros(length),
        column=integers(),
        block=integers(places),
        place=integers(places),
        origin=integers(),
        pivots=integers(size),
        left=floats(BLOCK_ROWS * STEPS),
        moves=moves(length, flush_columns(dtype) // FLUSH_VECTORS),
        zeros=integers(columns),
        fixed=np.zeros(columns, np.bool_),
        gone=np.zeros(blocks, np.bool_),
    )
