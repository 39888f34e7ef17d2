"""Positive-definite linear algebra of the engine, in float64: damping, inverses, exact refits on a mask.

Index legend: ``g`` problems of one layer, ``R`` rows, ``d`` columns; of one row, ``U`` are the kept columns and ``S``
the pruned ones. ``H`` is the Hessian, ``λ̄ = λ·mean(diag H)`` its damping, the mean taken over all ``d`` columns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.errors import NonFiniteError, NotPositiveDefiniteError, ShapeError

_DEAD_DIAGONAL = 1e-8
_FIRST_DAMPING = 1e-6
_BUDGET_SHARE = 0.25
_WIDE_ROW = 64
_REFINEMENTS = 8


@dataclass(frozen=True)
class InverseResult:
    """A damped Hessian and its inverse.

    Attributes:
        inverse: ``[g, d, d]`` float64, symmetric to the last bit.
        damped_hessian: ``[g, d, d]`` float64, the matrix that ``inverse`` inverts.
        damping: ``[g]`` float64, the share of ``mean(diag H)`` finally added to the diagonal of each problem.
        lam_bar: ``[g]`` float64, what was added: ``damping · mean(diag H)``.
        notes: One sentence per retry, empty when the first factorisation held.
    """

    inverse: Tensor
    damped_hessian: Tensor
    damping: Tensor
    lam_bar: Tensor
    notes: tuple[str, ...] = ()


def dead_columns(hessian: Tensor) -> Tensor:
    """Columns whose calibration inputs are all zero: ``[g, d]`` bool of an undamped ``[g, d, d]`` Hessian."""
    return hessian.diagonal(dim1=-2, dim2=-1) == 0


def is_diagonal(matrix: Tensor) -> bool:
    """True when ``[g, d, d]`` has no entry other than 0 off its diagonals."""
    return int(torch.count_nonzero(matrix)) == int(torch.count_nonzero(matrix.diagonal(dim1=-2, dim2=-1)))


def damped(hessian: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """``H + λ·mean(diag H)·I`` and ``λ̄``.

    A dead column that damping leaves at 0 (``λ = 0``, or all columns dead) gets the diagonal ``1e-8·mean(diag H)``,
    or 1 when the mean is 0 too. It couples with nothing, so no other column notices: it becomes nearly free to fix.

    Args:
        hessian: ``[g, d, d]`` float64, undamped.
        damping: ``λ``, a number or one per problem ``[g]``.

    Returns:
        The damped Hessian ``[g, d, d]`` (a copy) and ``λ̄`` ``[g]``, float64.
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    lam_bar = mean * damping
    result = hessian.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    diagonal += lam_bar[:, None]
    filler = torch.where(mean > 0, mean * _DEAD_DIAGONAL, torch.ones_like(mean))
    diagonal.copy_(torch.where(dead_columns(hessian) & (diagonal == 0), filler[:, None], diagonal))
    return result, lam_bar


def check_hessian(hessian: Tensor) -> None:
    """Refuse what no solver can use.

    Raises:
        ShapeError: Not ``[g, d, d]`` float64.
        NonFiniteError: NaN or Inf.
    """
    if hessian.ndim != 3 or hessian.shape[1] != hessian.shape[2] or hessian.dtype != torch.float64:
        raise ShapeError(
            "A Hessian has the wrong shape or type",
            got=f"{list(hessian.shape)} {hessian.dtype}",
            expected="[g, d, d] float64",
        )
    if not bool(torch.isfinite(hessian).all()):
        bad = (~torch.isfinite(hessian)).flatten(1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            "The Hessian holds NaN or Inf",
            got=f"problems {bad[:8]} of {hessian.shape[0]}",
            expected="finite values",
            remedy="look for NaN or Inf in the calibration inputs of this layer",
        )


def safe_inverse(hessian: Tensor, damping: float, *, retries: int = 3) -> InverseResult:
    """Invert the damped Hessian by a Cholesky factorisation, with bounded retries where it fails.

    A factorisation fails when a pivot is not positive, or so small against its diagonal entry (``10·d·eps``) that its
    digits are rounding errors. Only the problems that fail are retried, each time with ten times the damping
    (from 1e-6 when ``damping`` is smaller).

    Args:
        hessian: ``[g, d, d]`` float64, undamped.
        damping: Share of ``mean(diag H)`` to add to the diagonal, ``>= 0``.
        retries: Attempts after the first.

    Raises:
        ShapeError, NonFiniteError: See :func:`check_hessian`.
        NotPositiveDefiniteError: The last attempt failed too.
    """
    check_hessian(hessian)
    used = torch.full(hessian.shape[:1], float(damping), dtype=torch.float64, device=hessian.device)
    matrix, lam_bar = damped(hessian, used)
    factor, failed = _factor(matrix)
    notes: list[str] = []
    step = float(damping)
    for _ in range(retries):
        if not bool(failed.any()):
            break
        step = max(10 * step, _FIRST_DAMPING)
        notes.append(_retry_note(failed, used[failed][0].item(), step))
        used[failed] = step
        matrix[failed], lam_bar[failed] = damped(hessian[failed], step)
        factor[failed], again = _factor(matrix[failed])
        failed = failed.masked_scatter(failed, again)
    if bool(failed.any()):
        raise NotPositiveDefiniteError(
            "A Hessian stays indefinite under every damping tried",
            got=f"{int(failed.sum())} of {len(failed)} problems fail at damping {step:.3g}",
            expected="a positive definite H + damping·mean(diag H)·I",
            remedy="raise damping, add calibration samples, or check that H is symmetric and not negative",
        )
    inverse = torch.cholesky_inverse(factor)
    return InverseResult((inverse + inverse.mT) / 2, matrix, used, lam_bar, tuple(notes))


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors ``[g, d, d]`` and where they cannot be trusted, ``[g]`` bool."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    threshold = 10 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return factor, (info != 0) | ~(pivots > threshold * diagonal).all(-1)


def _retry_note(failed: Tensor, before: float, after: float) -> str:
    which = failed.nonzero().flatten().tolist()
    shown = ", ".join(map(str, which[:4])) + (", …" if len(which) > 4 else "")
    name = f"problem {shown}" if len(which) == 1 else f"{len(which)} problems ({shown})"
    return f"Cholesky failed for {name} at damping {before:.3g}, retried at {after:.3g}"


# The refit solves for one mask per row; rows are sorted by size so that a chunk pads little.
def masked_refit(
    damped_hessian: Tensor,
    dense: Tensor,
    mask: Tensor,
    *,
    inverse: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The exact optimum on a mask: minimise ``(w - w₀) H (w - w₀)ᵀ`` over ``w`` that are zero outside the mask.

    Kept form: ``w_U = w₀_U + H_UU⁻¹ H_US w₀_S`` (the same as ``H_UU⁻¹ (H w₀)_U``, and exact when nothing is pruned).
    Pruned form, for rows that lose fewer than they keep, when ``inverse`` is given: ``w = w₀ - G_:S G_SS⁻¹ w₀_S``.

    Args:
        damped_hessian: ``[g, d, d]`` float64, positive definite.
        dense: ``[g, R, d]`` weights, any floating type.
        mask: ``[g, R, d]`` bool, True = kept.
        inverse: ``[g, d, d]`` float64 inverse of ``damped_hessian``; None always takes the kept form.
        memory_budget: Bytes of working memory; None takes a share of what is free.

    Returns:
        ``[g, R, d]`` float64; pruned weights are ``+0.0``.

    Raises:
        NotPositiveDefiniteError: A factorisation failed.
    """
    groups, rows, columns = dense.shape
    if columns == 0 or groups * rows == 0:
        return dense.to(torch.float64)
    target = dense.to(torch.float64)
    result = torch.where(mask, target, torch.zeros_like(target)).reshape(groups * rows, columns)
    flat, kept = target.reshape(groups * rows, columns), mask.reshape(groups * rows, columns)
    count = kept.sum(1)
    few_pruned = (2 * count > columns) if inverse is not None else torch.zeros_like(count, dtype=torch.bool)
    size = torch.where(few_pruned, columns - count, count)
    moved = (count > 0) & (count < columns)
    budget = resolve_budget(memory_budget, dense.device)
    lost = (target * ~mask) @ damped_hessian
    lost = lost.reshape(groups * rows, columns)
    scaled_hessian = _Scaled.of(damped_hessian)
    scaled_inverse = scaled_hessian if inverse is None else _Scaled.of(inverse)
    for chosen in _size_chunks(size, moved & ~few_pruned, budget):
        picked, real = padded_columns(kept[chosen])
        step = _solve_on(scaled_hessian, chosen // rows, picked, real, lost[chosen].gather(1, picked))
        result[chosen] = result[chosen].scatter_add(1, picked, step * real)
    for chosen in _size_chunks(size, moved & few_pruned, budget):
        assert inverse is not None
        picked, real = padded_columns(~kept[chosen])
        solution = _solve_on(scaled_inverse, chosen // rows, picked, real, flat[chosen].gather(1, picked))
        step = torch.zeros_like(flat[chosen]).scatter_add_(1, picked, solution * real)
        moved_by = rowwise_product(step, inverse, chosen // rows)
        result[chosen] = torch.where(kept[chosen], flat[chosen] - moved_by, torch.zeros_like(step))
    return result.reshape(groups, rows, columns) + 0.0


def _size_chunks(size: Tensor, wanted: Tensor, budget: int) -> list[Tensor]:
    """Indices of the wanted rows in chunks of like size whose ``size²`` float64 matrices fit the budget."""
    index = wanted.nonzero().flatten()
    index = index[torch.argsort(size[index], stable=True)]
    sizes = size[index].tolist()
    chunks: list[Tensor] = []
    start = 0
    while start < len(sizes):
        stop = start + 1
        # Three matrices live at once (gather, factor, LAPACK's copy); padding may not double the flop.
        while stop < len(sizes) and sizes[stop] <= 1.2 * sizes[start] + 8:
            if 24 * (stop + 1 - start) * sizes[stop] ** 2 > budget:
                break
            stop += 1
        chunks.append(index[start:stop])
        start = stop
    return chunks


def padded_columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Columns set in each row of a bool ``[P, d]``, ascending, padded to the longest row; and which are real."""
    longest = int(chosen.sum(1).max())
    order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)[:, :longest]
    return order, chosen.gather(1, order)


def submatrix(matrix: Tensor, problem: Tensor, picked: Tensor, real: Tensor) -> Tensor:
    """``matrix[problem][picked, picked]`` for every row, with the identity at the padding: ``[P, k, k]``."""
    if matrix.device.type == "cpu" and picked.shape[1] >= _WIDE_ROW:
        # Row by row, two contiguous selections are faster than one indexed gather.
        sub = matrix.new_empty(*picked.shape, picked.shape[1])
        for row, (g, columns) in enumerate(zip(problem.tolist(), picked, strict=True)):
            torch.index_select(matrix[g].index_select(0, columns), 1, columns, out=sub[row])
    else:
        sub = matrix[problem[:, None, None], picked[:, :, None], picked[:, None, :]]
    if bool(real.all()):
        return sub
    sub *= real[:, :, None] & real[:, None, :]
    sub.diagonal(dim1=1, dim2=2).add_((~real).to(sub.dtype))
    return sub


@dataclass(frozen=True)
class _Scaled:
    """A positive definite matrix ``M`` as ``D⁻¹ N D⁻¹`` with ``N`` of unit diagonal, in both precisions."""

    unit: Tensor  # [g, d], the diagonal of D
    exact: Tensor  # [g, d, d] float64, N
    rough: Tensor  # float32

    @staticmethod
    def of(matrix: Tensor) -> _Scaled:
        unit = matrix.diagonal(dim1=1, dim2=2).rsqrt()
        exact = matrix * unit[:, :, None] * unit[:, None, :]
        return _Scaled(unit, exact, exact.to(torch.float32))


def _solve_on(scaled: _Scaled, problem: Tensor, picked: Tensor, real: Tensor, right: Tensor) -> Tensor:
    """Solve ``M_QQ x = right`` for every row's ``Q``, to float64 accuracy.

    A float32 factor does the work and float64 residuals correct it; rows on which that does not reach the backward
    error of a float64 factorisation get one.
    """
    unit = scaled.unit[problem].gather(1, picked) * real
    right = right * unit
    solution, good = _refine(scaled, problem, picked, real, right)
    left = (~good).nonzero().flatten()
    # The budget counts float64 matrices, so the rows left over fit it too.
    if len(left) > 0:
        matrix = submatrix(scaled.exact, problem[left], picked[left], real[left])
        factor, info = torch.linalg.cholesky_ex(matrix)
        if bool((info != 0).any()):
            raise NotPositiveDefiniteError(
                "A Hessian restricted to some of its columns is not positive definite",
                got=f"{int((info != 0).sum())} rows fail",
                expected="a positive definite damped Hessian",
                remedy="raise damping",
            )
        solution[left] = _substitute(factor, right[left])
    return solution * unit


def _refine(scaled: _Scaled, problem: Tensor, picked: Tensor, real: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Iterative refinement; returns the solutions ``[P, k]`` and the rows ``[P]`` on which it converged."""
    factor, info = torch.linalg.cholesky_ex(submatrix(scaled.rough, problem, picked, real))
    solution, residual = torch.zeros_like(right), right
    size, eps = picked.shape[1], torch.finfo(right.dtype).eps
    good = torch.zeros_like(info, dtype=torch.bool)
    spread = right.new_zeros(len(right), scaled.exact.shape[1])
    for _ in range(_REFINEMENTS):
        norm = residual.norm(dim=1, keepdim=True).clamp(min=torch.finfo(right.dtype).tiny)
        solution = solution + _substitute(factor, (residual / norm).to(torch.float32)).to(right.dtype) * norm
        spread = spread.zero_().scatter_add_(1, picked, solution * real)
        residual = right - rowwise_product(spread, scaled.exact, problem).gather(1, picked) * real
        bound = eps * (right.norm(dim=1) + size * solution.norm(dim=1))
        good = (info == 0) & (residual.norm(dim=1) <= bound)
        if bool(good.all()):
            break
    return solution, good


def _substitute(factor: Tensor, right: Tensor) -> Tensor:
    """Solve with a lower Cholesky factor."""
    half = torch.linalg.solve_triangular(factor, right[:, :, None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, :, 0]


def rowwise_product(rows: Tensor, matrix: Tensor, problem: Tensor) -> Tensor:
    """``rows[i] @ matrix[problem[i]]`` without a copy of the matrix per row."""
    if matrix.shape[0] == 1:
        return rows @ matrix[0]
    order = torch.argsort(problem, stable=True)
    counts = torch.bincount(problem, minlength=matrix.shape[0])
    slot = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[problem[order]]
    packed = rows.new_zeros(matrix.shape[0], int(counts.max()), rows.shape[1])
    packed[problem[order], slot] = rows[order]
    result = torch.empty_like(rows)
    result[order] = (packed @ matrix)[problem[order], slot]
    return result


def resolve_budget(memory_budget: int | None, device: torch.device) -> int:
    """Bytes a computation may use above its inputs: the caller's figure, or a quarter of what is free."""
    if memory_budget is not None:
        return memory_budget
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _BUDGET_SHARE)
    return int(_free_host_memory() * _BUDGET_SHARE)


def _free_host_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**31
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            return max(min(free, int(limit.read()) - int(current.read())), 2**26)
    except (OSError, ValueError):
        return free
