"""Positive-definite linear algebra of the engine, in float64: damping, inverses, submatrices.

Index legend: ``g`` problems of one layer, ``R`` rows, ``d`` columns; of one row, ``U`` are the kept columns and ``S``
the pruned ones. ``H`` is the Hessian, ``λ̄ = λ·mean(diag H)`` its damping, the mean taken over all ``d`` columns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.errors import AsymmetricHessianError, NonFiniteError, NotPositiveDefiniteError, ShapeError

_DEAD_DIAGONAL = 1e-8
_FIRST_DAMPING = 1e-6
_BUDGET_SHARE = 0.25
_WIDE_ROW = 64
# Rounding both triangles to bfloat16, apart, makes them differ by 2^-8 of an entry at most; this leaves a factor of 8
# for products that were accumulated in it. A triangle that was left empty differs by the correlation of two columns.
ASYMMETRY = 2.0**-5
_STRIP = 256


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

    A dead column that damping leaves at 0 (``λ = 0``, or all columns dead) gets the diagonal ``1e-8·mean(diag H)``;
    when that is 0 too, the smallest such mean of the other problems counts, and 1 when there is none. It couples with
    nothing, so no other column notices: it becomes nearly free to fix, in its own problem and beside the others.

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
    smallest = torch.where(mean > 0, mean, torch.inf).min()
    smallest = torch.where(torch.isinf(smallest), 1 / _DEAD_DIAGONAL, smallest)
    filler = torch.where(mean > 0, mean, smallest) * _DEAD_DIAGONAL
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


def symmetrised(hessian: Tensor) -> Tensor:
    """``[g, d, d]`` as it is where it is symmetric to the last bit, otherwise ``(H + Hᵀ)/2``.

    Its entries are products of columns, so ``√(H_ii H_jj)`` is the most that ``H_ij`` can be, and what the difference
    of the triangles is measured against. One pass in strips of rows; no copy unless one is returned.

    Raises:
        AsymmetricHessianError: The triangles differ by more than 1/32 of that somewhere.
        NonFiniteError: So they do because of Inf. NaN is left to :func:`check_hessian`.
    """
    scale = hessian.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    worst = []
    for first in range(0, hessian.shape[-1], _STRIP):
        here = slice(first, first + _STRIP)
        strip = (hessian[:, here, first:] - hessian[:, first:, here].mT).abs_()
        most = scale[:, here, None] * scale[:, None, first:]
        # Where a column is dead, nothing but zeros is possible: any difference is infinitely large.
        worst.append(torch.where(strip > 0, strip / most, 0.0).amax((1, 2)))
    found = torch.stack(worst, 1)
    largest = float(found.max())
    if largest > ASYMMETRY:
        check_hessian(hessian)
        _refuse_asymmetry(hessian, scale, largest, int(found.argmax()) // len(worst))
    return hessian if largest == 0 else (hessian + hessian.mT) / 2


def _refuse_asymmetry(hessian: Tensor, scale: Tensor, largest: float, problem: int) -> None:
    matrix, most = hessian[problem], scale[problem]
    difference = (matrix - matrix.T).abs()
    ratio = torch.where(difference > 0, difference / (most[:, None] * most), 0.0)
    i, j = divmod(int(ratio.argmax()), len(matrix))
    raise AsymmetricHessianError(
        "A Hessian is not symmetric",
        got=f"H[{i}, {j}] = {float(matrix[i, j]):.6g}, H[{j}, {i}] = {float(matrix[j, i]):.6g} in problem {problem}: "
        f"{largest:.3g} of √(H[{i}, {i}]·H[{j}, {j}]), the most",
        expected=f"2·X·Xᵀ/n with both triangles filled, equal to 1/{1 / ASYMMETRY:.0f} of that (less is averaged)",
        remedy="fill both triangles, H = (H + H.mT)/2 or torch.tril(H) + torch.tril(H, -1).mT, or accumulate H anew",
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
