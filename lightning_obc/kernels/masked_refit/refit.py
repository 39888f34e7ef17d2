"""The optimum of every row on its mask, to float64 accuracy.

Index legend: ``g`` problems of one layer, ``R`` rows, ``P = g·R``, ``d`` columns; of one row, ``U`` are the kept
columns, ``S`` the pruned ones, and ``Q`` whichever of the two is solved for, ``k`` columns.

A float32 Cholesky factor of every row's ``k × k`` matrix does the work; float64 residuals, matrix products that rows
share, correct its solutions (compiled on a CPU, see :mod:`.compiled`, batched torch elsewhere). Rows on which that does
not reach the backward error of a float64 factorisation get one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.kernels.host import flat_double_rows, flat_rows, symmetric
from lightning_obc.kernels.row_pool import Tensors, by_rows, task
from lightning_obc.linalg import padded_columns, resolve_budget, rowwise_product, submatrix

_REFINEMENTS = 8
# Bytes per k² of one row: gather, factor and LAPACK's copy in float64.
_FLOAT64_BYTES = 24


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
    shared = {"damped_hessian": damped_hessian, "inverse": inverse}
    by_row = {"dense": dense, "mask": mask}
    # A third of k³ for the factor of a row, and k is about half of the columns where it takes longest.
    flops = groups * rows * columns**3 / 24
    return by_rows("masked_refit", shared, by_row, {"memory_budget": memory_budget}, flops)["weight"]


@task("masked_refit")
def _refit_rows(shared: Tensors, by_row: Tensors, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """:func:`masked_refit` of some of a layer's rows."""
    budget = resolve_budget(options["memory_budget"], by_row["dense"].device)
    return {"weight": _refit(shared["damped_hessian"], by_row["dense"], by_row["mask"], shared["inverse"], budget)}


def _refit(damped_hessian: Tensor, dense: Tensor, mask: Tensor, inverse: Tensor | None, budget: int) -> Tensor:
    if dense.device.type != "cpu":
        return refit_batched(damped_hessian, dense, mask, inverse, budget)
    result, left = _refit_on_host(damped_hessian, dense, mask, inverse, budget)
    if left is None:
        return result
    exact = refit_batched(damped_hessian, dense, mask, inverse, budget, left.flatten())
    return torch.where(left[:, :, None], exact, result)


def _refit_on_host(
    damped_hessian: Tensor, dense: Tensor, mask: Tensor, inverse: Tensor | None, budget: int
) -> tuple[Tensor, Tensor | None]:
    """Compiled; returns the weights, and on which rows ``[g, R]`` they are not right, None where on none."""
    from lightning_obc.kernels.masked_refit import compiled

    target = flat_double_rows(dense)
    kept = flat_rows(mask)
    count, columns = kept.sum(1), kept.shape[1]
    few_pruned = (2 * count > columns) & (inverse is not None)
    moved = (count > 0) & (count < columns)
    result, left = np.where(kept, target, 0.0), np.zeros(len(kept), np.bool_)
    threads = torch.get_num_threads()
    for matrix, form, by_kept in ((damped_hessian, ~few_pruned, True), (inverse, few_pruned, False)):
        rows = np.flatnonzero(moved & form)
        if matrix is None or len(rows) == 0:
            continue
        array = symmetric(matrix)
        weight, good = compiled.refit(array, target, kept, rows, by_kept, _REFINEMENTS, threads, budget)
        result[rows], left[rows] = weight[rows], ~good[rows]
    result += 0.0
    where = torch.from_numpy(left.reshape(dense.shape[:2])) if left.any() else None
    return torch.from_numpy(result.reshape(dense.shape)), where


def refit_batched(
    damped_hessian: Tensor,
    dense: Tensor,
    mask: Tensor,
    inverse: Tensor | None,
    budget: int,
    wanted: Tensor | None = None,
) -> Tensor:
    """:func:`masked_refit` in batched torch, on any device, a chunk of rows of like size at a time.

    Args:
        wanted: ``[P]`` bool, the only rows to solve, and to solve by float64 factors at once; None is all rows.
    """
    groups, rows, columns = dense.shape
    target, refine = dense.to(torch.float64), wanted is None
    result = torch.where(mask, target, torch.zeros_like(target)).reshape(groups * rows, columns)
    flat, kept = target.reshape(groups * rows, columns), mask.reshape(groups * rows, columns)
    count = kept.sum(1)
    few_pruned = (2 * count > columns) if inverse is not None else torch.zeros_like(count, dtype=torch.bool)
    size = torch.where(few_pruned, columns - count, count)
    moved = (count > 0) & (count < columns)
    if wanted is not None:
        moved &= wanted
    if bool((moved & ~few_pruned).any()):
        scaled = _Scaled.of(damped_hessian, refine)
        lost = ((target * ~mask) @ damped_hessian).reshape(groups * rows, columns)
        for chosen in _size_chunks(size, moved & ~few_pruned, budget):
            picked, real = padded_columns(kept[chosen])
            step = _solve_on(scaled, chosen // rows, picked, real, lost[chosen].gather(1, picked), budget)
            result[chosen] = result[chosen].scatter_add(1, picked, step * real)
    if inverse is not None and bool((moved & few_pruned).any()):
        scaled = _Scaled.of(inverse, refine)
        for chosen in _size_chunks(size, moved & few_pruned, budget):
            picked, real = padded_columns(~kept[chosen])
            solution = _solve_on(scaled, chosen // rows, picked, real, flat[chosen].gather(1, picked), budget)
            step = torch.zeros_like(flat[chosen]).scatter_add_(1, picked, solution * real)
            moved_by = rowwise_product(step, inverse, chosen // rows)
            result[chosen] = torch.where(kept[chosen], flat[chosen] - moved_by, torch.zeros_like(step))
    return result.reshape(groups, rows, columns) + 0.0


def _size_chunks(size: Tensor, wanted: Tensor, budget: int) -> list[Tensor]:
    """Indices of the wanted rows in chunks of like size whose factors fit the budget."""
    index = wanted.nonzero().flatten()
    index = index[torch.argsort(size[index], stable=True)]
    sizes = size[index].tolist()
    chunks: list[Tensor] = []
    start = 0
    while start < len(sizes):
        stop = start + 1
        # Padding may not double the flop.
        while stop < len(sizes) and sizes[stop] <= 1.2 * sizes[start] + 8:
            if _FLOAT64_BYTES * (stop + 1 - start) * sizes[stop] ** 2 > budget:
                break
            stop += 1
        chunks.append(index[start:stop])
        start = stop
    return chunks


@dataclass(frozen=True)
class _Scaled:
    """A positive definite matrix ``M = D⁻¹ N D⁻¹`` with ``N`` of unit diagonal."""

    matrix: Tensor  # [g, d, d] float64, M
    unit: Tensor  # [g, d], the diagonal of D
    rough: Tensor | None  # [g, d, d] float32, N; None goes to float64 at once

    @staticmethod
    def of(matrix: Tensor, with_rough: bool) -> _Scaled:
        unit, rough = matrix.diagonal(dim1=1, dim2=2).rsqrt(), None
        if with_rough:
            rough = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device)
            for g, one in enumerate(unit):
                torch.mul(matrix[g] * one[:, None], one, out=rough[g])
        return _Scaled(matrix, unit, rough)


def _solve_on(scaled: _Scaled, problem: Tensor, picked: Tensor, real: Tensor, right: Tensor, budget: int) -> Tensor:
    """Solve ``M_QQ x = right`` for every row's ``Q``, to float64 accuracy."""
    unit = scaled.unit[problem].gather(1, picked) * real
    right = right * unit
    solution, good = torch.zeros_like(right), torch.zeros_like(problem, dtype=torch.bool)
    if scaled.rough is not None:
        solution, good = _refine(scaled, scaled.rough, problem, picked, real, unit, right)
    left = (~good).nonzero().flatten()
    step = max(1, budget // (_FLOAT64_BYTES * max(1, picked.shape[1]) ** 2))
    for rows in left.split(step):
        solution[rows] = _solve_exactly(scaled, problem[rows], picked[rows], real[rows], unit[rows], right[rows])
    return solution * unit


def _solve_exactly(
    scaled: _Scaled, problem: Tensor, picked: Tensor, real: Tensor, unit: Tensor, right: Tensor
) -> Tensor:
    """Solve ``N_QQ x = right`` by a float64 factor."""
    matrix = submatrix(scaled.matrix, problem, picked, real)
    size = torch.where(real, unit, torch.ones_like(unit))
    factor, info = torch.linalg.cholesky_ex(matrix.mul_(size[:, :, None]).mul_(size[:, None, :]))
    if bool((info != 0).any()):
        raise NotPositiveDefiniteError(
            "A Hessian restricted to some of its columns is not positive definite",
            got=f"{int((info != 0).sum())} rows fail",
            expected="a positive definite damped Hessian",
            remedy="raise damping",
        )
    return _substitute(factor, right)


def _refine(
    scaled: _Scaled, rough: Tensor, problem: Tensor, picked: Tensor, real: Tensor, unit: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Iterative refinement; returns the solutions ``[P, k]`` and the rows ``[P]`` on which it converged."""
    factor, info = torch.linalg.cholesky_ex(submatrix(rough, problem, picked, real))
    factored = info == 0
    solution, residual = torch.zeros_like(right), right
    size, eps = picked.shape[1], torch.finfo(right.dtype).eps
    good = torch.zeros_like(factored)
    spread = right.new_zeros(len(right), scaled.matrix.shape[1])
    for _ in range(_REFINEMENTS):
        norm = residual.norm(dim=1, keepdim=True).clamp(min=torch.finfo(right.dtype).tiny)
        solution = solution + _substitute(factor, (residual / norm).to(torch.float32)).to(right.dtype) * norm
        spread = spread.zero_().scatter_add_(1, picked, solution * unit)
        residual = right - rowwise_product(spread, scaled.matrix, problem).gather(1, picked) * unit
        bound = eps * (right.norm(dim=1) + size * solution.norm(dim=1))
        good = factored & (residual.norm(dim=1) <= bound)
        if bool(good.all()):
            break
    return solution, good


def _substitute(factor: Tensor, right: Tensor) -> Tensor:
    """Solve with a lower Cholesky factor."""
    half = torch.linalg.solve_triangular(factor, right[:, :, None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, :, 0]
