"""How rows enter the Triton sweep: fresh, sharing their problem's ``G``, or from a float64 inverse on what is free."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.kernels.obs_sweep.triton_chunk import Chunk, Job, aligned
from lightning_obc.kernels.obs_sweep.triton_kernels import BROKEN, RUNNING, Working
from lightning_obc.kernels.obs_sweep.types import SweepInput
from lightning_obc.linalg import padded_columns, rowwise_product, submatrix


def in_block_order(problem: SweepInput, members: Tensor) -> SweepInput:
    """Columns one block after the other; what short blocks lack (``members`` -1) become columns of the identity."""
    members = members.flatten()
    real, column = members >= 0, members.clamp(min=0)
    if torch.equal(members, torch.arange(problem.weight.shape[2], device=members.device)):
        return problem
    outside = torch.diag_embed((~real).to(torch.float64))

    def spread(matrix: Tensor) -> Tensor:
        inside = (real[:, None] & real).to(matrix.dtype)
        return matrix[:, column[:, None], column] * inside + outside.to(matrix.dtype)

    return SweepInput(
        problem.weight[:, :, column] * real,
        spread(problem.inverse),
        spread(problem.hessian),
        None if problem.keep is None else problem.keep[:, :, column] | ~real,
    )


def fresh(job: Job, rows: Tensor) -> Chunk:
    """Rows (int64, of the sweep) before their first step; nothing of ``G`` is copied.

    Weights that are zero already come first, so a group's quota counts them as they go.
    """
    problem = job.plan.problem
    size, owner = job.columns, rows // problem.weight.shape[1]
    weight = problem.weight.flatten(0, 1)[rows]
    column = torch.arange(size, dtype=torch.int32, device=rows.device).expand(len(rows), -1)
    quota = _quota(job, torch.zeros_like(weight, dtype=torch.bool))
    if quota is not None:
        column = column.masked_fill(~_open_or_zero(job, rows, quota), -1)
    reference = _pivots(problem.inverse, job.each)[owner]
    working = _working(job, rows, owner, weight, column, reference, quota)
    return Chunk(problem.inverse.contiguous(), True, size, job.plan.steps, job.slack, job.extra, working)


def take_zeros(job: Job, rows: Tensor) -> None:
    """Record the weights that are zero already, without eliminating them one by one; :func:`restarted` goes on."""
    lines = job.lines
    assert lines.keep is not None
    zeros = lines.keep[rows] == 0
    columns, real = padded_columns(zeros)
    lines.order[rows, : columns.shape[1]] = torch.where(real, columns, -1).to(torch.int32)
    lines.done[rows] = real.sum(1).to(torch.int32)
    if lines.codes is not None and lines.zero_point is not None:
        lines.codes[rows] = torch.where(zeros, lines.zero_point[rows], 0).to(torch.uint8)


def restarted(job: Job, rows: Tensor) -> Chunk:
    """Rows in the middle of their sweep, ``G`` and weights from the float64 inverse of ``H`` on their free columns.

    The columns fixed so far are read from the outputs. A row whose ``H`` cannot be factorised starts as broken.
    Weights that are zero already stay in their blocks, as columns of the identity.
    """
    fixed = _fixed(job, rows)
    candidates, quota = ~fixed, _quota(job, fixed)
    if quota is not None:
        candidates &= _open_or_zero(job, rows, quota)
    if job.block is not None and job.lines.keep is not None:
        fixed |= job.lines.keep[rows] == 0
    free, real = _at_least_one(*padded_columns(~fixed))
    picked, listed = padded_columns(candidates)
    alive = listed & ~fixed.gather(1, picked)
    size, weight = picked.shape[1], job.plan.problem.weight
    matrix = weight.new_empty(len(rows), size, aligned(size))
    current = weight.new_empty(len(rows), size)
    broken = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    each = 48 * free.shape[1] ** 2
    for part in torch.arange(len(rows), device=rows.device).split(max(1, job.plan.memory_budget // (4 * each + 1))):
        inverse, solved, failed = _solve(
            job, rows[part], fixed[part], free[part], real[part], picked[part], alive[part]
        )
        matrix[part, :, :size], current[part], broken[part] = inverse.to(weight.dtype), solved.to(weight.dtype), failed
    matrix.diagonal(dim1=1, dim2=2).add_((~alive).to(weight.dtype))
    column = torch.where(listed, picked, -1).to(torch.int32)
    reference = weight.new_ones(fixed.shape).scatter_(1, picked, _pivots(matrix[:, :, :size], job.each))
    owner = torch.arange(len(rows), device=rows.device)
    working = _working(job, rows, owner, current, column, reference, quota)
    working.status.masked_fill_(broken, BROKEN)
    remaining = job.plan.steps - int(job.lines.done[rows].min())
    return Chunk(matrix, False, size, remaining, 0, 0, working)


def _fixed(job: Job, rows: Tensor) -> Tensor:
    """Columns ``[P, d]`` that the rows have eliminated so far."""
    order, count = job.lines.order[rows].to(torch.int64), job.columns // job.each
    marks = torch.zeros(len(rows), count + 1, dtype=torch.bool, device=rows.device)
    return marks.scatter_(1, torch.where(order < 0, count, order), True)[:, :-1].repeat_interleave(job.each, 1)


def _at_least_one(columns: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`padded_columns`, with one column that is not real where no row has any."""
    return (columns, real) if columns.shape[1] else (columns.new_zeros(len(columns), 1), real.new_zeros(len(real), 1))


def _pivots(matrix: Tensor, size: int) -> Tensor:
    """Pivots ``[n, m]`` of the ``size × size`` diagonal blocks of ``[n, m, m]``; NaN where a block has none."""
    if size == 1:
        return matrix.diagonal(dim1=1, dim2=2)
    blocks = matrix.unflatten(1, (-1, size)).unflatten(3, (-1, size)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    factor, info = torch.linalg.cholesky_ex(blocks)
    pivots = factor.diagonal(dim1=2, dim2=3).square()
    return torch.where(info[:, :, None] > 0, torch.nan, pivots).flatten(1)


def _solve(
    job: Job, rows: Tensor, fixed: Tensor, free: Tensor, real: Tensor, picked: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``H_UU⁻¹`` and ``w_U = w₀_U + H_UU⁻¹ H_UF (w₀_F - q_F)``, ``F`` the columns fixed at ``q``, ``U`` the free.

    Returns both on the picked columns, ``[P, m, m]`` and ``[P, m]`` float64, zero where nothing is alive, and which
    rows have failed ``[P]``.
    """
    source, lines = job.plan.problem, job.lines
    problem, dense = rows // source.weight.shape[1], source.weight.flatten(0, 1)[rows].double()
    factor, info = torch.linalg.cholesky_ex(submatrix(source.hessian, problem, free, real))
    target = torch.zeros_like(dense)
    if lines.codes is not None and lines.scale is not None and lines.zero_point is not None:
        target = (lines.codes[rows].double() - lines.zero_point[rows].double()) * lines.scale[rows].double()
    moved = torch.where(fixed, dense - target, 0)
    right = rowwise_product(moved, source.hessian, problem).gather(1, free) * real
    rank = free.new_zeros(fixed.shape)
    rank.scatter_(1, free, torch.arange(free.shape[1], device=free.device).expand_as(free))
    units = factor.new_zeros(len(rows), free.shape[1], picked.shape[1])
    units.scatter_(1, rank.gather(1, picked)[:, None], alive[:, None].to(factor.dtype))
    # With L⁻¹ on the picked columns only, one batched product gives their inverse.
    half = torch.linalg.solve_triangular(factor, units, upper=False)
    step = half.mT @ torch.linalg.solve_triangular(factor, right[:, :, None], upper=False)
    weight = torch.where(alive, dense.gather(1, picked) + step[:, :, 0], 0)
    return half.mT @ half, weight, info != 0


def _working(
    job: Job, rows: Tensor, owner: Tensor, weight: Tensor, column: Tensor, reference: Tensor, quota: Tensor | None
) -> Working:
    count, size = weight.shape
    width = aligned(size)
    return Working(
        row=rows,
        owner=owner,
        status=rows.new_full((count,), RUNNING, dtype=torch.int32),
        weight=torch.nn.functional.pad(weight, (0, width - size)),
        diagonal=weight.new_empty(count, width) if job.block is None else _diagonal_blocks(job, weight),
        column=torch.nn.functional.pad(column, (0, width - size), value=-1),
        reference=reference.contiguous(),
        quota=quota,
        panel=weight.new_empty(count, job.panel(size) * job.each, width),
    )


def _diagonal_blocks(job: Job, weight: Tensor) -> Tensor:
    """Room for the diagonal blocks of ``G``: ``[P, tiles · c² · places of a tile + 1]``.

    The odd length keeps the compiler from giving a thread several places side by side: it would need a third more
    registers.
    """
    rows, size = weight.shape
    places = job.tuning.places(size, weight.element_size())
    return weight.new_empty(rows, -(-size // job.each // places) * places * job.each**2 + 1)


def _quota(job: Job, fixed: Tensor) -> Tensor | None:
    """Zeros that every group of every row has still to make ``[P, groups]``, given the fixed columns ``[P, d]``."""
    groups = job.plan.groups
    if groups is None:
        return None
    quota = groups.quota.expand(len(fixed), -1)
    return quota.scatter_add(1, groups.column_group.expand_as(fixed), -fixed.to(torch.int64))


def _open_or_zero(job: Job, rows: Tensor, quota: Tensor) -> Tensor:
    """Columns ``[P, d]`` whose group is open, or that are zero already."""
    assert job.plan.groups is not None
    open_group = quota.gather(1, job.plan.groups.column_group.expand(len(rows), -1)) > 0
    return open_group if job.lines.keep is None else open_group | (job.lines.keep[rows] == 0)
