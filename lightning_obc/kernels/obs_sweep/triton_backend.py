"""The CUDA default: a panel of eliminations per launch, one program per row, and batched products between panels.

Under ``TRITON_INTERPRET=1``, set before Triton is imported, the same kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch
import triton
from torch import Tensor

from lightning_obc.kernels.hessian_update.precision import exact_products
from lightning_obc.kernels.obs_sweep.dispatch import empty_output
from lightning_obc.kernels.obs_sweep.triton_chunk import Job, Tuning, bytes_per_row, run
from lightning_obc.kernels.obs_sweep.triton_kernels import BROKEN, WORN, Lines, panel_kernel
from lightning_obc.kernels.obs_sweep.triton_start import fresh, in_block_order, restarted, take_zeros
from lightning_obc.kernels.obs_sweep.types import (
    NMGroups,
    SweepInput,
    SweepOutput,
    SweepPlan,
    cheaper_to_invert,
)

log = logging.getLogger(__name__)

INTERPRETED = not isinstance(panel_kernel, triton.JITFunction)


def default_tuning(rows: int, itemsize: int, block: int = 1) -> Tuning:
    """Launch parameters here: on a GPU tiles of 4 KiB, less where a thread holds blocks; few and large operations for
    the interpreter."""
    if not INTERPRETED:
        return Tuning(columns=4096 // itemsize // (1 if block == 1 else 2 if block <= 4 else 4))
    return Tuning(rows=min(64, triton.next_power_of_2(rows)), columns=256, depth=8, lines=32)


def sweep(plan: SweepPlan, tuning: Tuning | None = None) -> SweepOutput:
    """Run the plan in chunks of rows that fit the memory budget.

    A chunk that runs out of device memory all the same is run again in halves, and so are the chunks after it; the
    first time is logged as a warning.

    Raises:
        torch.OutOfMemoryError: One row alone does not fit.
    """
    out = empty_output(plan)
    _run(_job(plan, out, tuning, None), out)
    return out


def sweep_blocks(problem: SweepInput, members: Tensor, memory_budget: int) -> SweepOutput:
    """Eliminate all blocks of every row, as :func:`sweep` does columns.

    Args:
        problem: Checked.
        members: ``[n, c]`` int64, columns of every block, -1 where a block is short.
        memory_budget: Bytes of working memory above inputs and outputs. One row at a time is always allowed.
    """
    plan = SweepPlan(in_block_order(problem, members), None, None, len(members), memory_budget)
    out = empty_output(plan)
    _run(_job(plan, out, None, members.shape[1]), out)
    return out


def _run(job: Job, out: SweepOutput) -> None:
    """Sweep all rows, in smaller chunks where memory runs out."""
    device, total = out.count.device, out.count.numel()
    size, start, warned = rows_per_chunk(job), 0, False
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact_products(device.type))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        while start < total:
            rows = torch.arange(start, min(start + size, total), device=device)
            if _fits(job, out, rows):
                start += len(rows)
                continue
            size = (len(rows) + 1) // 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if not warned:
                log.warning("Out of device memory with %d rows in flight; going on with %d", len(rows), size)
            warned = True
    out.broken.logical_or_(~torch.isfinite(out.losses).all(-1))


def rows_per_chunk(job: Job) -> int:
    """Rows whose working memory fits three quarters of the budget; the rest is for restarts in float64."""
    groups, rows, _ = job.plan.problem.weight.shape
    return max(1, min(groups * rows, job.plan.memory_budget * 3 // 4 // bytes_per_row(job)))


def _job(plan: SweepPlan, out: SweepOutput, tuning: Tuning | None, block: int | None) -> Job:
    problem, grid, groups = plan.problem, plan.grid, plan.groups

    def lines(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().flatten(0, 1).contiguous()

    keep = lines(problem.keep)
    return Job(
        plan,
        Lines(
            scale=None if grid is None else lines(grid.scale),
            zero_point=None if grid is None else lines(grid.zero_point),
            keep=None if keep is None else keep.to(torch.uint8),
            group=None if groups is None else groups.column_group.contiguous(),
            order=out.order.view(-1, plan.steps),
            losses=out.losses.view(-1, plan.steps),
            done=out.count.view(-1),
            codes=None if out.codes is None else out.codes.flatten(0, 1),
        ),
        tuning or default_tuning(out.count.numel(), problem.weight.element_size(), block or 1),
        *_closing_bound(groups, keep is not None),
        block,
    )


def _closing_bound(groups: NMGroups | None, zeros: bool) -> tuple[int, int]:
    """``slack`` and ``extra`` of :class:`Job`. Zeros that are there already lie as they like: nothing is promised."""
    if groups is None or zeros:
        return 0, 0
    members = torch.bincount(groups.column_group, minlength=len(groups.quota))
    used = groups.quota > 0
    slack, extra = torch.stack([(groups.quota - 1)[used].sum(), (members - groups.quota)[used].min()]).tolist()
    return slack, extra


def _fits(job: Job, out: SweepOutput, rows: Tensor) -> bool:
    """Sweep a chunk; False when memory ran out and the chunk can still be halved."""
    try:
        _sweep_rows(job, out, rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
        return False
    return True


def _sweep_rows(job: Job, out: SweepOutput, rows: Tensor) -> None:
    """The only waits for the device are here, one when all panels are queued, and in restarts."""
    lines = job.lines
    lines.order[rows], lines.losses[rows], lines.done[rows] = -1, 0, 0
    if lines.keep is None:
        chunk = fresh(job, rows)
    elif job.block is not None:
        chunk = restarted(job, rows)
    elif cheaper_to_invert(job.columns, int((lines.keep[rows] == 0).sum(1).min())):
        take_zeros(job, rows)
        chunk = restarted(job, rows)
    else:
        chunk = fresh(job, rows)
    while True:
        run(job, chunk)
        rows, status = chunk.working.row, chunk.working.status
        # Their memory is free for the rows that start again.
        del chunk
        out.broken.view(-1)[rows] = status == BROKEN
        rows = rows[status == WORN]
        if len(rows) == 0:
            return
        chunk = restarted(job, rows)
