"""All levels of a sweep at once: one Cholesky factorisation per row serves every prefix of its elimination order.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns, ``K`` levels. Order the columns of a row so that what is
eliminated last comes first, and factor ``H = L Lᵀ``. The leading ``k × k`` block of ``L`` belongs to the ``k`` columns
that a level keeps; with ``y = L⁻¹ H w`` its weights are ``L_k⁻ᵀ y_k`` and its (damped) loss is ``½ Σ_{j > k} y_j²``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError

DEFAULT_BUDGET = 2**29


@dataclass(frozen=True)
class PrefixLosses:
    """Losses of every level, summed over rows and problems.

    Attributes:
        loss: ``[K]`` float64, ``½ Σ Δw H Δwᵀ`` with the undamped ``H``.
        damping_loss: ``[K]`` float64, ``½ λ̄ ‖ΔW‖²``.
    """

    loss: Tensor
    damping_loss: Tensor


def prefix_losses(
    damped: Tensor,
    lam_bar: Tensor,
    weight: Tensor,
    order: Tensor,
    counts: Tensor,
    *,
    memory_budget: int = DEFAULT_BUDGET,
) -> PrefixLosses:
    """Losses of all levels after an exact refit on each.

    Args:
        damped: ``[g, d, d]`` float64, ``H + λ̄ I``.
        lam_bar: ``[g]`` float64.
        weight: ``[g, R, d]`` dense weights.
        order: ``[g, R, d]`` int, columns in the order of elimination.
        counts: ``[K, g, R]`` int64, eliminated columns of each row at each level.
        memory_budget: Bytes of working memory.

    Raises:
        NotPositiveDefiniteError: A factorisation failed.
    """
    groups, rows, columns = weight.shape
    levels = counts.shape[0]
    loss = torch.zeros(levels, dtype=torch.float64, device=weight.device)
    damping_loss = torch.zeros_like(loss)
    per_row = 8 * columns * (3 * columns + 3 * levels)
    step = max(1, memory_budget // per_row)
    for group in range(groups):
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            total, moved = _rows(damped[group], weight[group, chunk], order[group, chunk], counts[:, group, chunk])
            penalty = lam_bar[group] * moved / 2
            damping_loss += penalty
            loss += total - penalty
    return PrefixLosses(loss.clamp(min=0), damping_loss)


def _rows(damped: Tensor, weight: Tensor, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Damped losses and ``‖ΔW‖²``, ``[K]`` each, of a chunk of rows ``[P, d]``."""
    columns = weight.shape[1]
    last_first = order.flip(1).long()
    matrix = damped[last_first[:, :, None], last_first[:, None, :]]
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise NotPositiveDefiniteError(
            "A Hessian is not positive definite in some order of its columns",
            got=f"{int((info != 0).sum())} of {len(info)} rows fail",
            expected="a positive definite damped Hessian",
            remedy="raise damping",
        )
    dense = weight.double().gather(1, last_first)
    # y = L⁻¹ H w is Lᵀ w.
    solved = (factor.mT @ dense[:, :, None])[:, :, 0]
    kept = torch.arange(columns, device=weight.device) < columns - counts[:, :, None]
    masked = torch.where(kept, solved, torch.zeros_like(solved))
    losses = torch.where(kept, torch.zeros_like(solved), solved.square()).sum((1, 2)) / 2
    # Zeros below the prefix stay zeros in the back-substitution, so that all levels share one triangular solve.
    weights = torch.linalg.solve_triangular(factor.mT, masked.permute(1, 2, 0), upper=True)
    return losses, (weights - dense[:, :, None]).square().sum((0, 1))
