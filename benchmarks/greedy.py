"""Judge a finished unstructured sweep in float64, whatever its width, without repeating it.

Elimination in a given order is a Cholesky factorisation of ``G`` in that order: with ``G_ππ = L Lᵀ``, ``z = L⁻¹ w_π``
step ``t`` costs ``z_t²/2``, and before it the columns ``i`` still alive hold ``w_i - Σ_{k<t} L_ik z_k`` and
``G_ii - Σ_{k<t} L_ik²``. One factorisation shows every loss and every choice, at ``d³/3`` flop where the oracle takes
``2d³`` of memory traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def judge(hessian: Tensor, weight: Tensor, order: Tensor, losses: Tensor) -> tuple[float, float]:
    """How far one row's recorded sweep is from the float64 greedy one that shares its past.

    Args:
        hessian: ``[d, d]`` float64, damped.
        weight: ``[d]``.
        order: ``[d]``, all columns.
        losses: ``[d]``, as recorded.

    Returns:
        The share of steps that take the cheapest column (dearer by 1e-4 or less counts), and the relative error of the
        summed losses.
    """
    order = order.long()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))[order][:, order]
    factor = torch.linalg.cholesky(inverse)
    columns = factor.T.contiguous()
    w = weight.double()[order]
    z = torch.linalg.solve_triangular(factor, w[:, None], upper=False)[:, 0]
    left, pivots = w.clone(), inverse.diagonal().clone()
    right = 0
    for step in range(len(order)):
        scores = left[step:].square() / pivots[step:]
        right += int(scores[0] <= (1 + 1e-4) * scores.min())
        left -= z[step] * columns[step]
        pivots -= columns[step].square()
    exact = z.square().sum() / 2
    return right / len(order), (losses.double().sum() / exact - 1).abs().item()
