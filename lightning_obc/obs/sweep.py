"""One full elimination of a layer, from which every sparsity level follows (paper, section 4, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.brief import Brief
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.curves import POINTS, Curve, heap_curve
from lightning_obc.obs.problem import HessianLike, Problem, prepare
from lightning_obc.obs.refit import refit_on_mask
from lightning_obc.obs.running import run_with_retries
from lightning_obc.obs.select import masks_from_order, row_counts, zeros_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import Selection, Unstructured


@dataclass(frozen=True, repr=False)
class Sweep(Brief):
    """Elimination order and losses of every row; no intermediate weights are kept.

    Attributes:
        order: ``[R, d]`` or ``[g, R, d]`` int32, the column that goes at each step.
        losses: Same shape, the increase of the damped loss at each step; weights that are zero already come first.
        problem: The prepared problem.
        fixed: ``[g, R]`` int64, number of weights of each row that are zero already.
        backend: The backend that ran.
        memory_budget: Bytes for the working memory of refits, None for a share of what is free.
    """

    order: Tensor
    losses: Tensor
    problem: Problem
    fixed: Tensor
    backend: str
    memory_budget: int | None = None

    def mask(self, sparsity: float, selection: Selection = "heap") -> Tensor:
        """Keep-mask ``[g, R, d]`` of the layer at a sparsity; existing zeros stay zero.

        Args:
            sparsity: Share of zeros, in [0, 1).
            selection: How zeros spread over the rows: ``"heap"`` (the paper), ``"sorted"`` or ``"hull"``.

        Raises:
            SpecError: ``sparsity`` outside [0, 1).
        """
        Unstructured(sparsity)
        columns = self.order.shape[-1]
        losses, order = self.losses.reshape(-1, columns), self.order.reshape(-1, columns)
        zeros = zeros_for(sparsity, losses.numel())
        counts = row_counts(losses, zeros, selection, self.fixed.reshape(-1))
        return masks_from_order(order, counts).reshape(self.problem.weight.shape)

    def solution(self, sparsity: float, selection: Selection = "heap") -> LayerSolution:
        """The layer at ``sparsity``: mask from the order, weights by an exact solve on the mask.

        Raises:
            SpecError: ``sparsity`` outside [0, 1).
        """
        return solve_mask(self.problem, self.mask(sparsity, selection), self.backend, self.memory_budget)

    def solutions(self, sparsities: Iterable[float], selection: Selection = "heap") -> list[LayerSolution]:
        """Several levels from the one sweep.

        Args:
            sparsities: Shares of zeros, in [0, 1).
            selection: How zeros spread over the rows: ``"heap"`` (the paper), ``"sorted"`` or ``"hull"``.
        """
        return [self.solution(sparsity, selection) for sparsity in sparsities]

    def curve(self, points: int = POINTS) -> Curve:
        """The layer's damped loss over sparsity in the order of ``selection="heap"``, before any refit.

        Args:
            points: How many, evenly spaced over all weights that are not zero already.

        Returns:
            Pairs of sparsity in (0, 1] and loss as a share of the loss of removing everything.
        """
        curve = self.loss_curve(points)
        return tuple((share, loss / curve[-1][1]) for share, loss in curve)

    def loss_curve(self, points: int = POINTS) -> Curve:
        """:meth:`curve` with damped losses as they are."""
        return heap_curve(self.losses.reshape(-1, self.losses.shape[-1]), int(self.fixed.sum()), points)


def sweep(
    weight: Tensor,
    hessian: HessianLike,
    *,
    damping: float = 0.01,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Sweep:
    """Eliminate every weight of every row in OBS order.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``; weights that are zero already leave first and stay zero.
        hessian: ``[d, d]``, ``[g, d, d]`` or the two-half statistic, undamped.
        damping: Share of ``mean(diag H)`` added to the diagonal.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Raises:
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: See :func:`lightning_obc.obs.prepare`.
    """
    backend = obs_sweep.resolve_backend(backend, weight.device.type)
    return sweep_prepared(prepare(weight, hessian, damping), backend, memory_budget)


def sweep_prepared(problem: Problem, backend: str, memory_budget: int | None = None) -> Sweep:
    """:func:`sweep` of a problem that is prepared already; ``backend`` is resolved."""
    keep = existing_zeros(problem)

    def kernel(problem: Problem) -> obs_sweep.SweepOutput:
        return obs_sweep.sweep_prune(problem.sweep_input(keep), backend=backend, memory_budget=memory_budget)

    problem, output = run_with_retries(problem, kernel)
    fixed = torch.zeros_like(output.count, dtype=torch.int64) if keep is None else (~keep).sum(-1)
    return Sweep(
        order=problem.shaped(output.order),
        losses=problem.shaped(in_units(output.losses, problem.units())),
        problem=problem,
        fixed=fixed,
        backend=backend,
        memory_budget=memory_budget,
    )


def in_units(losses: Tensor, units: Tensor | None) -> Tensor:
    # What needs a unit of its own may not fit into float32 in any other.
    return losses if units is None else losses.double() * units[:, None, None]


def existing_zeros(problem: Problem) -> Tensor | None:
    """Keep-mask of the weights that are not zero already, or None when there are no zeros."""
    keep = problem.weight != 0
    return None if bool(keep.all()) else keep


def solve_mask(
    problem: Problem, mask: Tensor, backend: str, memory_budget: int | None = None, notes: tuple[str, ...] = ()
) -> LayerSolution:
    """Optimal weights on a mask: ``w_U = (H + λ̄I)_UU⁻¹ ((H + λ̄I) w)_U`` in float64, never accumulated updates.

    Args:
        problem: The prepared problem.
        mask: ``[g, R, d]`` bool, True = kept.
        backend: For the record.
        memory_budget: Bytes of working memory.
        notes: For the record.
    """
    if bool(mask.all()):
        weight = problem.original_batched()
    else:
        weight = refit_on_mask(problem, mask, memory_budget)
    return problem.solution(weight, mask, problem.status(backend, *notes))
