"""Weights for the inputs that a layer gets behind compressed layers.

Index legend: ``g`` problems of a layer, ``R`` rows, ``d`` columns. ``X`` are a layer's inputs before earlier layers are
compressed, ``X'`` those behind them; ``H' = 2 X' X'ᵀ / n``, ``D = 2 (X - X') X'ᵀ / n``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_obc import linalg
from lightning_obc.errors import ShapeError
from lightning_obc.hessian import PairedHessian
from lightning_obc.kernels.masked_refit import masked_refit
from lightning_obc.obs.lookup import row_excess
from lightning_obc.obs.problem import quadratic
from lightning_obc.obs.solution import LayerSolution


@dataclass(frozen=True)
class Recentred:
    """Where a layer starts from behind compressed layers.

    Attributes:
        weight: ``[g, R, d]``, dtype of the weight passed in; its zeros are still zeros.
        inherited: Squared output error per sample that this weight has already, before anything of it is pruned or
            rounded: at ``mixing`` 1 what no weight can repair, up to damping; at 0 all that the inputs bring.
    """

    weight: Tensor
    inherited: float


def recentre(weight: Tensor, paired: PairedHessian, *, mixing: float = 1.0, damping: float = 0.01) -> Recentred:
    """``W' = W + α·W·D·(H' + λ̄I)⁻¹``, the weights that make ``W X`` from ``X'`` as well as ``λ̄`` allows.

    At ``α = 1`` it minimises ``‖W X - W' X'‖²·2/n + λ̄‖W' - W‖²`` over the weights that keep the zeros of ``W``, so
    that ``W`` stays, bit for bit, where nothing has changed. The statistic is that of all samples, so both of its
    halves have a share in the result.

    Args:
        weight: ``[g, R, d]``, any floating type.
        paired: Statistic of the layer's inputs before and after.
        mixing: ``α``, 0 to 1.
        damping: Share of ``mean(diag H')`` that ``λ̄`` is.

    Raises:
        ShapeError: Weight and statistic do not belong together.
        NotPositiveDefiniteError: No bounded damping makes ``H'`` positive definite.
    """
    _check(weight, paired)
    if mixing == 0:
        return Recentred(weight, output_error(weight, weight, paired))
    dense, device = weight.double(), weight.device
    inverse = linalg.safe_inverse(paired.hessian.full().to(device), damping)
    step = dense @ paired.cross.to(device) @ inverse.inverse
    mask = weight != 0
    if not bool(mask.all()):
        step = masked_refit(inverse.damped_hessian, step, mask)
    moved = (dense + mixing * step).to(weight.dtype)
    return Recentred(moved, output_error(weight, moved, paired))


def output_error(before: Tensor, weight: Tensor, paired: PairedHessian) -> float:
    """``‖W X - V X'‖² / n`` with ``before`` as ``W`` and ``weight`` as ``V``, both ``[g, R, d]``, in float64."""
    _check(before, paired)
    dense, device = before.double(), before.device
    delta = dense - weight.double()
    mixed = float(((dense @ paired.cross.to(device)) * delta).sum())
    own = quadratic(dense, paired.difference.to(device)) + quadratic(delta, paired.hessian.full().to(device))
    return max(own + mixed + row_excess(delta, paired.hessian), 0.0)


def against_before(solution: LayerSolution, before: Tensor, paired: PairedHessian) -> LayerSolution:
    """The same solution with ``loss`` and ``reference`` measured against ``W X``, the layer's output before.

    Args:
        solution: Solution of the recentred weight under the statistic of ``X'``.
        before: ``W``, ``[g, R, d]``.
        paired: Statistic of the layer's inputs before and after.
    """
    reference = quadratic(before.double(), paired.before().to(before.device)) + row_excess(before, paired.hessian)
    return replace(solution, loss=output_error(before, solution.weight, paired), reference=reference)


def _check(weight: Tensor, paired: PairedHessian) -> None:
    groups, columns = paired.hessian.groups, paired.hessian.columns
    if weight.dim() != 3 or (weight.shape[0], weight.shape[2]) != (groups, columns):
        raise ShapeError(
            "Weight and paired statistic do not fit together",
            got=tuple(weight.shape),
            expected=f"[{groups}, R, {columns}]",
        )
