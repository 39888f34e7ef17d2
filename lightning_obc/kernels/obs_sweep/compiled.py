"""The CPU default: rows in parallel threads, each a compiled sweep in its own cache (see :mod:`.rows`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_obc.kernels.host import flat_rows, numpy_type, symmetric
from lightning_obc.kernels.obs_sweep import rows as kernel
from lightning_obc.kernels.obs_sweep.dispatch import empty_output
from lightning_obc.kernels.obs_sweep.jit import aligned
from lightning_obc.kernels.obs_sweep.lanes import LANES
from lightning_obc.kernels.obs_sweep.packed import moves, pack, packed_size, padded
from lightning_obc.kernels.obs_sweep.state import Options, Problem, Result, Scratch
from lightning_obc.kernels.obs_sweep.tile import FLUSH_VECTORS, flush_columns, panel_columns
from lightning_obc.kernels.obs_sweep.types import OUTLIER_TOLERANCE, WORN_FLOAT32, SweepOutput, SweepPlan
from lightning_obc.kernels.threads import run_blocks

# Columns of a panel: ``NARROW_STEPS`` while at most ``NARROW`` are in the working set, else ``STEPS``.
NARROW, NARROW_STEPS, STEPS = 700, 32, 64


def sweep(plan: SweepPlan) -> SweepOutput:
    """Run the plan on the CPU."""
    out = empty_output(plan)
    rows, columns = out.order.shape[0] * out.order.shape[1], plan.problem.weight.shape[2]
    problem, result = _problem(plan), _result(out, columns)
    options = _options(plan)
    threads = _threads(rows, columns, problem.weight.itemsize, plan.memory_budget)
    block = max(1, min(rows // (4 * threads), 10**8 // columns**3))

    def begin() -> Callable[[int, int], None]:
        scratch = _scratch(columns, len(problem.quota), problem.weight.dtype)
        return lambda first, last: kernel.sweep_rows(first, last, problem, result, scratch, options)

    run_blocks(rows, block, threads, begin)
    return out


def _threads(rows: int, columns: int, itemsize: int, budget: int) -> int:
    """As many threads as torch uses, as far as their working memory fits the budget."""
    each = packed_size(columns) * (itemsize + 8) + STEPS * padded(columns) * (itemsize + 8)
    return max(1, min(torch.get_num_threads(), rows, budget // each))


def _problem(plan: SweepPlan) -> Problem:
    source = plan.problem
    groups, _, columns = source.weight.shape
    inverse = symmetric(source.inverse)
    packed = np.empty((groups, packed_size(columns)), inverse.dtype)
    for g in range(groups):
        pack(inverse[g], packed[g])
    dtype = inverse.dtype
    none = np.zeros((0, columns), dtype)
    zeros = np.zeros((0, columns), np.bool_) if source.keep is None else flat_rows(~source.keep)
    scale, zero_point = (
        (none, none) if plan.grid is None else (flat_rows(plan.grid.scale), flat_rows(plan.grid.zero_point))
    )
    hessian = symmetric(source.hessian)
    return Problem(flat_rows(source.weight), packed, hessian, zeros, scale, zero_point, *_groups(plan))


def _groups(plan: SweepPlan) -> tuple[NDArray[np.int32], ...]:
    """Group of every column, columns sorted by group, where each group starts, and its quota."""
    if plan.groups is None:
        return (np.zeros(0, np.int32),) * 4
    group, quota = plan.groups.column_group.numpy(), plan.groups.quota.numpy()
    members = np.argsort(group, kind="stable")
    first = np.searchsorted(group[members], np.arange(len(quota) + 1))
    return tuple(np.ascontiguousarray(part, np.int32) for part in (group, members, first, quota))


def _result(out: SweepOutput, columns: int) -> Result:
    """Views of the output tensors: the kernel writes into them."""
    codes = torch.empty(0, columns, dtype=torch.uint8) if out.codes is None else out.codes
    order, losses = flat_rows(out.order), flat_rows(out.losses)
    return Result(order, losses, out.count.view(-1).numpy(), out.broken.view(-1).numpy(), flat_rows(codes))


def _options(plan: SweepPlan) -> Options:
    scalar = numpy_type(plan.problem.weight.dtype).type
    return Options(
        quantize=plan.grid is not None,
        max_code=scalar(0 if plan.grid is None else plan.grid.max_code),
        outlier=scalar((0.5 * (1 + OUTLIER_TOLERANCE)) ** 2),
        **shared_options(plan.problem.weight),
    )


def shared_options(weight: Tensor) -> dict[str, Any]:
    """What the sweeps over columns and over blocks have in common, in the dtype of the weights ``[g, R, d]``."""
    dtype, double = numpy_type(weight.dtype), np.dtype(np.float64)
    scalar = dtype.type
    return {
        "rows": weight.shape[1],
        "big": scalar(np.finfo(dtype).max / 4),
        "zero": scalar(0),
        "half": scalar(0.5),
        "one": scalar(1),
        "worn": scalar(_worn_ratio(dtype)),
        "steps": STEPS,
        "narrow_steps": NARROW_STEPS,
        "narrow": NARROW,
        "flush_width": flush_columns(dtype),
        "panel_width": panel_columns(dtype),
        "flush_width64": flush_columns(double),
        "panel_width64": panel_columns(double),
    }


def _worn_ratio(dtype: np.dtype[Any]) -> float:
    """How far a pivot may shrink since its row's last float64 start: as many digits are left to either precision."""
    return float(WORN_FLOAT32 * np.finfo(np.float32).eps / np.finfo(dtype).eps)


def _scratch(columns: int, groups: int, dtype: np.dtype[Any]) -> Scratch:
    """Memory of one thread. The float64 part stays untouched, and so unallocated, until a row restarts."""
    size, length = packed_size(columns), padded(columns)

    def floats() -> NDArray[Any]:
        return np.zeros(length, dtype)

    def integers(count: int = length) -> NDArray[np.int32]:
        return np.zeros(count, np.int32)

    return Scratch(
        packed=aligned(size, dtype),
        panel=aligned(STEPS * length, dtype),
        packed64=aligned(size, np.dtype(np.float64)),
        panel64=aligned(NARROW_STEPS * length, np.dtype(np.float64)),
        weight=floats(),
        diagonal=floats(),
        reference=floats(),
        penalty=floats(),
        score=floats(),
        best=np.zeros(LANES, dtype),
        scale=floats(),
        inverse_scale=floats(),
        zero_point=floats(),
        right=np.zeros(length),
        unit=np.zeros(length),
        moved=np.zeros(length),
        column=integers(),
        position=integers(),
        leaving=integers(),
        origin=integers(),
        moves=moves(columns, flush_columns(dtype) // FLUSH_VECTORS),
        zeros=integers(),
        free=integers(),
        fixed=np.zeros(length, np.bool_),
        target=np.zeros(length),
        made=integers(groups),
    )
