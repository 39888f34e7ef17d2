"""Structured pruning: whole input channels leave, for all rows and kernel positions together.

The rows share the set that leaves, so they share ``G`` as well and one elimination serves the layer, and every level of
it. Removing the columns ``S`` of a channel costs ``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` (ZipLM, arXiv 2302.04089, section 3.1).

Weights that are zero already stay zero, so they leave ``G`` first. Where rows have different zeros they have different
``G``: then each row has its own, if these fit the memory budget.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns, ``C`` input channels of a problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.brief import Brief
from lightning_obc.errors import SpecError
from lightning_obc.kernels import obs_sweep
from lightning_obc.linalg import resolve_budget
from lightning_obc.obs.problem import HessianLike, Problem, check_channels, prepare
from lightning_obc.obs.running import run_with_retries
from lightning_obc.obs.select import zeros_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.obs.sweep import existing_zeros, solve_mask
from lightning_obc.specs import Structured

# Copies of the inverses alive at once: the inverses, the restricted Hessian or one problem's copy, and a product.
_MATRICES = 3


@dataclass(frozen=True, repr=False)
class ChannelOrder(Brief):
    """What an elimination of channels recorded.

    Attributes:
        order: ``[T, 2]`` int64 of (problem, channel). Ties go to the lower index.
        losses: ``[T]`` float64, the increase of the damped loss at each step.
        broken: ``[g]`` bool, True when a pivot block of a problem was not positive definite.
    """

    order: Tensor
    losses: Tensor
    broken: Tensor


@dataclass(frozen=True, repr=False)
class StructuredSweep(Brief):
    """Order in which input channels leave a layer; every structured level is a prefix of it.

    Attributes:
        order: ``[T, 2]`` int64 of (problem, channel).
        losses: ``[T]`` float64, the increase of the damped loss at each step.
        channels: Input channels per problem.
        alive: ``[g, R, d]`` bool, weights that are not zero already.
        problem: The prepared problem.
        backend: The backend that ran.
        memory_budget: Bytes for the working memory of refits, None for a share of what is free.
        notes: For the record of every level.
    """

    order: Tensor
    losses: Tensor
    channels: int
    alive: Tensor
    problem: Problem
    backend: str
    memory_budget: int | None = None
    notes: tuple[str, ...] = ()

    def mask(self, sparsity: float) -> Tensor:
        """Keep-mask ``[g, R, d]`` once a share of all channels is gone; channels of zeros count already.

        Raises:
            SpecError: ``sparsity`` outside [0, 1), or beyond the steps of this sweep.
        """
        Structured(sparsity)
        groups, rows, columns = self.alive.shape
        steps = zeros_for(sparsity, groups * self.channels)
        if steps > len(self.order):
            raise SpecError(
                "A structured level lies beyond its sweep",
                got=f"{steps} channels at sparsity {sparsity:.6g}",
                expected=f"at most the {len(self.order)} that were eliminated",
                remedy="sweep to a larger sparsity",
            )
        gone = torch.zeros(groups, self.channels, dtype=torch.bool, device=self.alive.device)
        gone[self.order[:steps, 0], self.order[:steps, 1]] = True
        by_channel = self.alive.view(groups, rows, columns // self.channels, self.channels)
        return (by_channel & ~gone[:, None, None]).reshape(self.alive.shape)

    def solution(self, sparsity: float) -> LayerSolution:
        """The layer with a share of its channels gone: weights by an exact solve on the mask."""
        return solve_mask(self.problem, self.mask(sparsity), self.backend, self.memory_budget, self.notes)

    def solutions(self, sparsities: Iterable[float]) -> list[LayerSolution]:
        """Several levels from the one sweep."""
        return [self.solution(sparsity) for sparsity in sparsities]


def sweep_structured(
    weight: Tensor,
    hessian: HessianLike,
    *,
    channels: int | None = None,
    sparsity: float | None = None,
    damping: float = 0.01,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> StructuredSweep:
    """Eliminate input channels, all kernel positions and rows of a channel together, in OBS order.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``; weights that are zero already stay zero.
        hessian: ``[d, d]``, ``[g, d, d]`` or the two-half statistic, undamped.
        channels: Input channels per kernel position; default ``d``.
        sparsity: The strongest level that will be asked for; None eliminates every channel.
        damping: Share of ``mean(diag H)`` added to the diagonal.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``; ``"triton"`` has channels of at most
            64 kernel positions.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Raises:
        SpecError: ``sparsity`` outside [0, 1).
        PatternError: ``channels`` does not divide the columns.
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: See :func:`lightning_obc.obs.prepare`.
    """
    if sparsity is not None:
        Structured(sparsity)
    channels = check_channels(weight.shape[-1], channels)
    obs_sweep.channel_backend(backend, weight.device.type, weight.shape[-1] // channels)
    return sweep_structured_prepared(prepare(weight, hessian, damping), channels, sparsity, backend, memory_budget)


def sweep_structured_prepared(
    problem: Problem,
    channels: int,
    sparsity: float | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> StructuredSweep:
    """:func:`sweep_structured` of a problem that is prepared already; ``channels`` divides its columns."""
    device, positions = problem.weight.device, problem.weight.shape[-1] // channels
    problem = problem.with_dtype(torch.float64)
    total = problem.weight.shape[0] * channels
    steps = total if sparsity is None else zeros_for(sparsity, total)
    keep = existing_zeros(problem)
    shared = keep is None or bool((keep == keep[:, :1]).all())
    own = keep is not None and not shared and _fits(problem.weight, memory_budget)
    backend = obs_sweep.channel_backend(backend, device.type, positions, channels, own)
    notes: tuple[str, ...] = ()
    if not shared and not own:
        notes = ("zeros of single rows did not enter the order of channels: one inverse for each row is too much",)

    def kernel(problem: Problem) -> ChannelOrder:
        return eliminate_channels(problem, channels, steps, keep, own_inverses=own, backend=backend)

    problem, output = run_with_retries(problem, kernel)
    alive = torch.ones_like(problem.weight, dtype=torch.bool) if keep is None else keep
    return StructuredSweep(
        output.order, output.losses, channels, alive, problem, backend, memory_budget=memory_budget, notes=notes
    )


def _fits(weight: Tensor, memory_budget: int | None) -> bool:
    groups, rows, columns = weight.shape
    return _MATRICES * 8 * groups * rows * columns**2 <= resolve_budget(memory_budget, weight.device)


def eliminate_channels(
    problem: Problem,
    channels: int,
    steps: int,
    keep: Tensor | None = None,
    *,
    own_inverses: bool = False,
    backend: str = "auto",
) -> ChannelOrder:
    """Greedy order in which input channels leave.

    Args:
        problem: The prepared problem, ``d = positions · channels``.
        channels: Input channels per problem.
        steps: How many channels leave, over all ``g`` problems together.
        keep: ``[g, R, d]`` bool, False at weights that are zero for good, or None.
        own_inverses: One inverse for each row, without the row's zeros; otherwise one for all rows of a problem,
            without the columns that are zero in all of them.
        backend: What sweeps the channels.
    """
    source = obs_sweep.SweepInput(problem.weight.double(), problem.inverse, problem.damped, keep)
    swept = obs_sweep.sweep_channels(source, channels, min(steps, channels), own_inverses=own_inverses, backend=backend)
    return merged(swept, steps)


def merged(swept: obs_sweep.ChannelOutput, steps: int) -> ChannelOrder:
    """The first steps of all problems in one order: again and again the cheapest next one, the lower problem of equals.

    Problems do not touch each other, so this is the order in which one elimination over all of them would go. A step
    that is cheaper than one before it in its problem follows at once: it counts as much as the dearest one so far.
    """
    taken = torch.sort(torch.cummax(swept.losses, 1).values.flatten(), stable=True).indices[:steps]
    problem = taken // max(1, swept.order.shape[1])
    order = torch.stack([problem, swept.order.flatten()[taken]], 1)
    return ChannelOrder(order, swept.losses.flatten()[taken], swept.broken)
