"""AdaPrune (Hubara et al., arXiv 2102.08124): a magnitude mask, then the remaining weights re-optimised.

The original runs a gradient method on the squared layer error; on one layer that problem is least squares, so it is
solved exactly here.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from lightning_obc.baselines.magnitude import magnitude_mask
from lightning_obc.errors import SpecError
from lightning_obc.obs.damping import with_damping
from lightning_obc.obs.problem import HessianLike, check_channels, prepare
from lightning_obc.obs.prune import check_fit
from lightning_obc.obs.refit import refit_on_mask
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, Misfit, Pattern, Structured, Unstructured, parse_pattern


def adaprune(
    weight: Tensor,
    hessian: HessianLike,
    pattern: Pattern | str | float,
    *,
    steps: int = 1,
    channels: int | None = None,
    misfit: Misfit = "error",
    damping: float | str = 0.01,
    memory_budget: int | None = None,
) -> LayerSolution:
    """Prune by magnitude and re-optimise what remains by least squares, once or in several steps.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``. Weights that are zero already count and stay zero.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic.
        pattern: A pattern or its shorthand.
        steps: Rounds of pruning and re-optimisation on the way to the pattern; 1 is the published method.
        channels, misfit, damping, memory_budget: As in :func:`lightning_obc.obs.prune`.

    Raises:
        SpecError: ``steps`` is below 1.
        PatternError, ShapeError, NonFiniteError, NotPositiveDefiniteError: See :func:`lightning_obc.obs.prune`.
    """
    pattern = parse_pattern(pattern)
    channels = check_channels(weight.shape[-1], channels)
    check_fit(pattern, channels, misfit)
    if steps < 1:
        raise SpecError("AdaPrune needs at least one step", got=steps, expected="steps >= 1")

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        problem = prepare(rows, half, damping)
        current = problem.weight.double()
        for step in range(1, steps + 1):
            mask = magnitude_mask(_on_the_way(pattern, step / steps), current, channels)
            current = refit_on_mask(problem, mask, memory_budget)
        return problem.solution(current, mask, problem.status("adaprune"))

    return with_damping(weight, hessian, damping, solve)


def _on_the_way(pattern: Pattern, share: float) -> Pattern:
    """The pattern with only ``share`` of its zeros."""
    if isinstance(pattern, NM):
        kept = pattern.m - math.ceil(share * (pattern.m - pattern.n) - 1e-9)
        return NM(min(kept, pattern.m - 1), pattern.m)
    if isinstance(pattern, (Unstructured, Block, Structured)):
        return replace(pattern, sparsity=share * pattern.sparsity)
    return pattern
