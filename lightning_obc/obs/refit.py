"""Optimal weights on a mask; one factorisation for all rows of a problem where they share it.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns; ``U`` columns kept, ``S`` columns removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.kernels.masked_refit import masked_refit
from lightning_obc.obs.problem import Problem


def refit_on_mask(problem: Problem, mask: Tensor, memory_budget: int | None = None) -> Tensor:
    """``w_U = w₀_U + H_UU⁻¹ H_US w₀_S`` of every row under the damped ``H``, to float64 accuracy.

    Args:
        problem: The prepared problem.
        mask: ``[g, R, d]`` bool, True = kept.
        memory_budget: Bytes of working memory; None takes a share of what is free.

    Returns:
        ``[g, R, d]`` float64; removed weights are ``+0.0``.

    Raises:
        NotPositiveDefiniteError: A factorisation failed.
    """
    # Half precision has been widened there, which changes no value.
    dense = problem.weight
    if dense.shape[1] > 1 and bool((mask == mask[:, :1]).all()):
        parts = zip(problem.damped, dense.double(), mask[:, 0], strict=True)
        return torch.stack([_refit_together(hessian, rows, kept) for hessian, rows, kept in parts])
    return masked_refit(problem.damped, dense, mask, inverse=problem.inverse, memory_budget=memory_budget)


def _refit_together(hessian: Tensor, dense: Tensor, kept: Tensor) -> Tensor:
    """Rows ``[R, d]`` of one problem that keep the same columns ``[d]``."""
    inside, outside = kept.nonzero().flatten(), (~kept).nonzero().flatten()
    result = torch.zeros_like(dense)
    if len(inside) == 0:
        return result
    lost = dense[:, outside] @ hessian[outside[:, None], inside]
    factor, info = torch.linalg.cholesky_ex(hessian[inside[:, None], inside])
    if bool(info > 0):
        raise NotPositiveDefiniteError(
            "A Hessian is not positive definite on the kept columns",
            expected="a positive definite damped Hessian",
            remedy="raise damping",
        )
    result[:, inside] = dense[:, inside] + torch.cholesky_solve(lost.mT, factor).mT
    return result + 0.0
