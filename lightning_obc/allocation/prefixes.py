"""All levels of a sweep at once: one Cholesky factorisation per row serves every prefix of its elimination order (one
for all rows where they share the order, as in structured pruning).

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
    _, rows, columns = weight.shape
    levels = counts.shape[0]
    loss = torch.zeros(levels, dtype=torch.float64, device=weight.device)
    damping_loss = torch.zeros_like(loss)
    for group, own in enumerate(order):
        together = rows > 1 and bool((own == own[:1]).all())
        per_row = 8 * columns * ((0 if together else 3 * columns) + 3 * levels)
        step = max(1, memory_budget // per_row)
        factors = _factor(damped[group], order[group, :1]) if together else None
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            taken = order[group, chunk]
            factor = _factor(damped[group], taken) if factors is None else factors
            total, moved = _rows(factor, weight[group, chunk], taken, counts[:, group, chunk])
            penalty = lam_bar[group] * moved / 2
            damping_loss += penalty
            loss += total - penalty
    return PrefixLosses(loss.clamp(min=0), damping_loss)


def _factor(damped: Tensor, order: Tensor) -> Tensor:
    """``L [P, d, d]`` of ``H = L Lᵀ`` with the columns of each row ``order [P, d]`` reversed."""
    last_first = order.flip(1).long()
    factor, info = torch.linalg.cholesky_ex(damped[last_first[:, :, None], last_first[:, None, :]])
    if bool((info != 0).any()):
        raise NotPositiveDefiniteError(
            "A Hessian is not positive definite in some order of its columns",
            got=f"{int((info != 0).sum())} of {len(info)} rows fail",
            expected="a positive definite damped Hessian",
            remedy="raise damping",
        )
    return factor


def _rows(factor: Tensor, weight: Tensor, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Damped losses and ``‖ΔW‖²``, ``[K]`` each, of a chunk of rows ``[P, d]`` with a factor each, or one for all."""
    rows, columns = weight.shape
    dense = weight.double().gather(1, order.flip(1).long())
    kept = torch.arange(columns, device=weight.device) < columns - counts[:, :, None]
    # y = L⁻¹ H w is Lᵀ w.
    if len(factor) == rows:
        solved = (factor.mT @ dense[:, :, None])[:, :, 0]
    else:
        solved = dense @ factor[0]
    masked = torch.where(kept, solved, torch.zeros_like(solved))
    losses = torch.where(kept, torch.zeros_like(solved), solved.square()).sum((1, 2)) / 2
    # Zeros below the prefix stay zeros in the back-substitution, so that all levels share one triangular solve.
    if len(factor) == rows:
        weights = torch.linalg.solve_triangular(factor.mT, masked.permute(1, 2, 0), upper=True)
        return losses, (weights - dense[:, :, None]).square().sum((0, 1))
    weights = torch.linalg.solve_triangular(factor[0].mT, masked.flatten(0, 1).mT, upper=True).mT
    return losses, (weights.unflatten(0, (-1, rows)) - dense).square().sum((1, 2))
