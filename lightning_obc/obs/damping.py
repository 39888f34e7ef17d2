"""Choose the damping on one half of the calibration samples, judged on the other half."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.obs.problem import HessianLike, check_weight, full_hessian, on_device, quadratic
from lightning_obc.obs.solution import LayerSolution

CANDIDATES = (1e-3, 1e-2, 3e-2, 1e-1, 0.3)
DEFAULT = 1e-2
ROWS = 32

Solve = Callable[[Tensor, Tensor, float], LayerSolution]


def resolve_damping(
    weight: Tensor, hessian: HessianLike, damping: float | str, solve: Solve
) -> tuple[float, float | None]:
    """A damping that is given, or chosen by :func:`choose_damping`; and the held-out error where it was measured.

    Raises:
        SpecError: Neither a number >= 0 nor ``"auto"``, or ``"auto"`` without the two-half statistic.
    """
    if damping == "auto":
        return choose_damping(weight, hessian, solve)
    if isinstance(damping, str) or not (math.isfinite(damping) and damping >= 0):
        raise SpecError("Unknown damping", got=repr(damping), expected='a finite number >= 0, or "auto"')
    return damping, None


def with_damping(weight: Tensor, hessian: HessianLike, damping: float | str, solve: Solve) -> LayerSolution:
    """Run ``solve`` on all rows and samples with a damping that is given, or chosen by the two halves."""
    share, held_out = resolve_damping(weight, hessian, damping, solve)
    return solve(weight, full_hessian(hessian), share).with_held_out(held_out)


def choose_damping(weight: Tensor, hessian: HessianLike, solve: Solve) -> tuple[float, float | None]:
    """Sweep a sample of rows at several dampings on each half; score the held-out loss on the other.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``.
        hessian: The two-half statistic.
        solve: ``solve(rows, half_hessian, damping)``, the same solver that will run on the whole layer.

    Returns:
        The damping of least held-out error, and that relative error; ``(1e-2, None)`` when only one half has samples.

    Raises:
        SpecError: ``hessian`` is a plain tensor, which has no halves.
        ShapeError, NonFiniteError: See :func:`lightning_obc.obs.prepare`.
    """
    if not isinstance(hessian, Hessian):
        raise SpecError(
            'damping="auto" needs the two-half calibration statistic',
            got="one Hessian tensor",
            expected="lightning_obc.Hessian with samples in both halves",
            remedy="pass the statistic that calibration returns, or a number as damping",
        )
    check_weight(weight)
    if not hessian.has_both_halves:
        return DEFAULT, None
    rows = sample_rows(weight if weight.dim() == 3 else weight[None])
    halves = [on_device(hessian.half(index), weight.device) for index in (0, 1)]
    scored = [(_held_out(rows, halves, damping, solve), damping) for damping in CANDIDATES]
    error, damping = min(scored)
    return damping, error


def sample_rows(weight: Tensor) -> Tensor:
    """At most 32 rows in all of ``[g, R, d]``, evenly spaced, at least one of every problem."""
    wanted = max(1, ROWS // weight.shape[0])
    if weight.shape[1] <= wanted:
        return weight
    picked = torch.linspace(0, weight.shape[1] - 1, wanted, device=weight.device).round().long()
    return weight[:, picked]


def _held_out(rows: Tensor, halves: list[Tensor], damping: float, solve: Solve) -> float:
    """Relative held-out error, both directions summed; infinite when the solver fails."""
    loss = reference = 0.0
    for fitted, judged in (halves, halves[::-1]):
        try:
            solution = solve(rows, fitted, damping)
        except NotPositiveDefiniteError:
            return float("inf")
        loss += quadratic(solution.weight.double() - rows.double(), judged)
        reference += quadratic(rows.double(), judged)
    return loss / max(reference, 1e-300)
