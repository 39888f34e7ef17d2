"""The error of a layer's weights against others than those that its solver started from.

Index legend: ``g`` problems of a layer, ``R`` rows, ``d`` columns. ``X`` are the layer's calibration inputs, ``X'``
those behind compressed layers where the statistic is of both; ``H = 2 X Xᵀ / n``.
"""

from __future__ import annotations

from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.obs.lookup import row_excess
from lightning_obc.obs.problem import quadratic
from lightning_obc.obs.recentre import output_error


def relative_error(before: Tensor, weight: Tensor, statistic: Hessian | PairedHessian) -> float:
    """``tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`` with ``ΔW = V - W``, in float64; of a paired statistic ``‖W X - V X'‖² / ‖W X‖²``.

    Args:
        before: ``W``, ``[g, R, d]``, any floating type.
        weight: ``V``, of the same shape, on the same device.
        statistic: Of the layer's inputs; moved to that device.

    Raises:
        ShapeError: Weights and statistic do not belong together.
    """
    hessian = statistic.hessian if isinstance(statistic, PairedHessian) else statistic
    expected = (hessian.groups, before.shape[-2], hessian.columns)
    if not before.shape == weight.shape == expected:
        raise ShapeError(
            "Two weights and a statistic do not fit together",
            got=f"{list(before.shape)} and {list(weight.shape)}",
            expected=f"[{hessian.groups}, R, {hessian.columns}] of both",
        )
    reference = before.double()
    if isinstance(statistic, PairedHessian):
        loss, full = output_error(before, weight, statistic), statistic.before().to(before.device)
    else:
        full, delta = hessian.full().to(before.device), weight.double() - reference
        loss = max(quadratic(delta, full) + row_excess(delta, hessian), 0.0)
    return 0.0 if loss == 0 else loss / max(quadratic(reference, full) + row_excess(reference, hessian), 1e-300)
