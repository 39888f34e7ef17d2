"""The symmetric sweep tableau of a mask: everything a swap needs, under rank-1 updates.

Index legend: ``P`` rows at once, ``d`` columns; of one row, ``U`` are the kept columns and ``S`` the removed ones.
Sweeping ``H`` on ``U`` gives

    T_UU = -H_UU⁻¹     T_US = H_UU⁻¹ H_US     T_SS = H_SS - H_SU H_UU⁻¹ H_US

and the vector ``y`` that is swept along holds ``-w`` on ``U`` and the gradient ``H (w - w₀)`` on ``S``. With ``D =
diag T``, ``y_p²/(2|D_p|)`` is both the cost of removing a kept ``p`` and the gain of bringing a removed ``p`` back.
Changing the side of column ``k`` is one rank-1 update, ``T - v vᵀ/D_k`` with ``v = T_k`` but ``v_k = D_k ∓ 1``
(minus when ``k`` enters ``U``), after which ``D_k`` becomes ``-1/D_k``. ``T`` itself is not updated: columns are
corrected by the updates so far when they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.linalg import padded_columns, submatrix


def pivot_block(matrices: Tensor, which: Tensor, pivots: Tensor) -> Tensor:
    """Sweep symmetric positive definite matrices on a set of pivots each.

    With ``M`` the pivot rows of a matrix ``A`` less those of the identity, the tableau of the module's docstring is
    ``A - Mᵀ (A_UU)⁻¹ M - 2 I_UU``: one product, no copies between blocks. Subtracting the identity costs no digits
    when the diagonal of ``A`` is 1, so the matrices are scaled to that, and the result is scaled back.

    Args:
        matrices: ``[g, d, d]`` float64.
        which: ``[P]`` int64, the matrix of every row.
        pivots: ``[P, d]`` bool.

    Returns:
        ``[P, d, d]``, the tableau with ``U = pivots``.

    Raises:
        NotPositiveDefiniteError: A factorisation fails.
    """
    if not bool(pivots.any()):
        return matrices[which]
    size = matrices.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(matrices.dtype).tiny).rsqrt()
    unit = matrices * size[:, :, None] * size[:, None, :]
    picked, real = padded_columns(pivots)
    factor, info = torch.linalg.cholesky_ex(submatrix(unit, which, picked, real))
    if bool(torch.any(info > 0)):
        raise NotPositiveDefiniteError(
            "A Hessian restricted to a mask is not positive definite",
            got=f"{int((info > 0).sum())} of {len(info)} rows fail",
            expected="a positive definite damped Hessian",
            remedy="raise damping",
        )
    rows = unit[which[:, None], picked]
    rows.scatter_add_(2, picked[..., None], -torch.ones_like(rows[..., :1]))
    rows *= real[..., None]
    base = unit.expand(len(which), -1, -1) if len(unit) == 1 else unit[which]
    swept = torch.baddbmm(base, rows.mT, torch.cholesky_inverse(factor) @ rows, alpha=-1)
    swept.diagonal(dim1=1, dim2=2).sub_(2 * pivots.to(swept.dtype))
    back = torch.where(pivots, size[which], 1 / size[which])
    return swept.mul_(back[:, :, None]).mul_(back[:, None, :])


def tableau(hessian: Tensor, inverse: Tensor, which: Tensor, kept: Tensor) -> Tensor:
    """The tableau of masks ``kept [P, d]``, from ``H`` or from ``G = H⁻¹`` (``[g, d, d]``), whichever pivots less."""
    if 2 * int(kept.sum()) <= kept.numel():
        return pivot_block(hessian, which, kept)
    return -pivot_block(inverse, which, ~kept)


@dataclass
class SwapState:
    """Rows in mid-search. Mutable, owned by one search.

    Attributes:
        base: ``[P, d, d]``, the tableau at the start.
        diagonal: ``[P, d]``, current ``D``.
        linear: ``[P, d]``, current ``y``.
        kept: ``[P, d]`` bool.
        updates: ``[P, t, d]``, the vectors ``v`` so far.
        factors: ``[P, t]``, their ``1/D_k``; 0 for rows that did not move.
        used: Number of updates so far.
    """

    base: Tensor
    diagonal: Tensor
    linear: Tensor
    kept: Tensor
    updates: Tensor
    factors: Tensor
    used: int = 0

    @classmethod
    def start(cls, base: Tensor, dense: Tensor, kept: Tensor, swaps: int) -> SwapState:
        """State of optimal weights on ``kept``.

        Args:
            base: ``[P, d, d]`` from :func:`tableau`.
            dense: ``[P, d]`` float64 target weights.
            kept: ``[P, d]`` bool.
            swaps: Swaps there is room for.
        """
        gone = torch.where(kept, 0.0, dense)
        # On U: w_U = w₀_U + H_UU⁻¹ H_US w₀_S; on S: the gradient -(T_SS w₀_S). One product gives both.
        product = (base @ gone[..., None])[..., 0]
        linear = torch.where(kept, -(dense + product), -product)
        rows, columns = dense.shape
        updates = base.new_zeros(rows, 2 * swaps, columns)
        diagonal = base.diagonal(dim1=1, dim2=2).clone()
        return cls(base, diagonal, linear, kept.clone(), updates, base.new_zeros(rows, 2 * swaps))

    @property
    def saliency(self) -> Tensor:
        """``[P, d]``: cost of removing a kept column, gain of bringing a removed one back."""
        return self.linear.square() / (2 * self.diagonal.abs())

    @property
    def weight(self) -> Tensor:
        """``[P, d]`` optimal weights on the mask; 0 where removed."""
        return torch.where(self.kept, -self.linear, 0.0)

    def columns(self, chosen: Tensor) -> Tensor:
        """Current columns ``[P, K, d]`` of the tableau for indices ``[P, K]``."""
        wide = chosen[..., None].expand(*chosen.shape, self.base.shape[-1])
        result = self.base.gather(1, wide)
        if self.used:
            past, factors = self.updates[:, : self.used], self.factors[:, : self.used]
            weights = past.gather(2, chosen[:, None, :].expand(-1, self.used, -1)) * factors[..., None]
            result = torch.baddbmm(result, weights.mT, past, alpha=-1)
        # Updates skip the diagonal's own constant; the diagonal is kept apart.
        return result.scatter(2, chosen[..., None], self.diagonal.gather(1, chosen)[..., None])

    def flip_(self, chosen: Tensor, moving: Tensor) -> Tensor:
        """Change the side of column ``chosen [P]`` in the rows ``moving [P]``, in place; returns ``v [P, d]``."""
        column = chosen[:, None]
        pivot = self.diagonal.gather(1, column)
        vector = self.columns(column)[:, 0]
        sign = torch.where(self.kept.gather(1, column), 1.0, -1.0)
        vector.scatter_(1, column, pivot + sign)
        factor = torch.where(moving[:, None], 1 / pivot, 0.0)
        here = self.linear.gather(1, column)
        self.diagonal -= factor * vector.square()
        self.linear -= factor * vector * here
        self.diagonal.scatter_(1, column, torch.where(moving[:, None], -1 / pivot, pivot))
        # The rank-1 rule holds for the others only; y_k becomes y_k/D_k when k enters, -y_k/D_k when it leaves.
        self.linear.scatter_(1, column, torch.where(moving[:, None], -sign * here / pivot, here))
        self.kept.scatter_(1, column, self.kept.gather(1, column) ^ moving[:, None])
        self.updates[:, self.used] = vector
        self.factors[:, self.used] = factor[:, 0]
        self.used += 1
        return vector
