"""Structured pruning: whole input channels leave, for all rows and kernel positions together.

The rows share the set that leaves, so they share ``G`` as well and one elimination serves the layer, and every level of
it. Removing the columns ``S`` of a channel costs ``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` (ZipLM, arXiv 2302.04089, section 3.1).

Weights that are zero already stay zero, so they leave ``G`` first. Where rows have different zeros they have different
``G``: then each row has its own, if these fit the memory budget.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns, ``C`` input channels of a problem; ``P`` inverses of a problem
(1 or ``R``) with ``Q`` rows each, ``P · Q = R``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class ChannelOrder:
    """What an elimination of channels recorded.

    Attributes:
        order: ``[T, 2]`` int64 of (problem, channel). Ties go to the lower index.
        losses: ``[T]`` float64, the increase of the damped loss at each step.
        broken: ``[1]`` bool, True when a pivot block was not positive definite.
    """

    order: Tensor
    losses: Tensor
    broken: Tensor


@dataclass(frozen=True)
class StructuredSweep:
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
    backend: str = "torch"
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
        backend: ``"auto"`` or ``"torch"``.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Raises:
        SpecError: ``sparsity`` outside [0, 1).
        PatternError: ``channels`` does not divide the columns.
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: See :func:`lightning_obc.obs.prepare`.
    """
    if sparsity is not None:
        Structured(sparsity)
    obs_sweep.resolve_among(backend, weight.device.type, ("torch",), "structured")
    channels = check_channels(weight.shape[-1], channels)
    return sweep_structured_prepared(prepare(weight, hessian, damping), channels, sparsity, memory_budget)


def sweep_structured_prepared(
    problem: Problem, channels: int, sparsity: float | None = None, memory_budget: int | None = None
) -> StructuredSweep:
    """:func:`sweep_structured` of a problem that is prepared already; ``channels`` divides its columns."""
    problem = problem.with_dtype(torch.float64)
    total = problem.weight.shape[0] * channels
    steps = total if sparsity is None else zeros_for(sparsity, total)
    keep = existing_zeros(problem)
    shared = keep is None or bool((keep == keep[:, :1]).all())
    own = keep is not None and not shared and _fits(problem.weight, memory_budget)
    notes: tuple[str, ...] = ()
    if not shared and not own:
        notes = ("zeros of single rows did not enter the order of channels: one inverse for each row is too much",)

    def kernel(problem: Problem) -> ChannelOrder:
        return eliminate_channels(problem, channels, steps, keep, own_inverses=own)

    problem, output = run_with_retries(problem, kernel)
    alive = torch.ones_like(problem.weight, dtype=torch.bool) if keep is None else keep
    return StructuredSweep(
        output.order, output.losses, channels, alive, problem, memory_budget=memory_budget, notes=notes
    )


def _fits(weight: Tensor, memory_budget: int | None) -> bool:
    groups, rows, columns = weight.shape
    return _MATRICES * 8 * groups * rows * columns**2 <= resolve_budget(memory_budget, weight.device)


def eliminate_channels(
    problem: Problem, channels: int, steps: int, keep: Tensor | None = None, *, own_inverses: bool = False
) -> ChannelOrder:
    """Greedy order in which input channels leave.

    Args:
        problem: The prepared problem, ``d = positions · channels``.
        channels: Input channels per problem.
        steps: How many channels leave, over all ``g`` problems together.
        keep: ``[g, R, d]`` bool, False at weights that are zero for good, or None.
        own_inverses: One inverse for each row, without the row's zeros; otherwise one for all rows of a problem,
            without the columns that are zero in all of them.
    """
    groups, rows, columns = problem.weight.shape
    parts = rows if own_inverses else 1
    weight = problem.weight.double().reshape(groups, parts, rows // parts, columns).clone()
    bad = torch.zeros(1, dtype=torch.bool, device=weight.device)
    inverse = _start(problem, keep, own_inverses, bad)
    members = torch.arange(columns, device=weight.device).reshape(columns // channels, channels).T
    gone = torch.zeros(groups, channels, dtype=torch.bool, device=weight.device)
    order, losses = [], []
    scores = _scores(weight, inverse, members, gone, bad) if steps else None
    for _ in range(steps):
        assert scores is not None
        # Indices stay on the device and have a dimension (one without would be read), so that no step waits for it.
        flat = scores.argmin().reshape(1)
        group, channel = flat // channels, flat % channels
        order.append(torch.cat([group, channel]))
        losses.append(scores.flatten().index_select(0, flat)[0])
        alone = groups == 1
        one_weight, one_inverse = (weight, inverse) if alone else (weight[group], inverse[group])
        _eliminate_(one_weight[0], one_inverse[0], members[channel][0])
        gone.view(-1).index_fill_(0, flat, True)
        if alone:
            scores = _scores(weight, inverse, members, gone, bad)
            continue
        weight.index_copy_(0, group, one_weight)
        inverse.index_copy_(0, group, one_inverse)
        scores = scores.index_copy(0, group, _scores(one_weight, one_inverse, members, gone[group], bad))
    if not order:
        empty = torch.zeros(0, dtype=torch.float64, device=weight.device)
        return ChannelOrder(empty.new_zeros((0, 2), dtype=torch.int64), empty, bad)
    return ChannelOrder(torch.stack(order), torch.stack(losses), bad)


def _start(problem: Problem, keep: Tensor | None, own_inverses: bool, bad: Tensor) -> Tensor:
    """``[g, P, d, d]``: inverses of the damped Hessian on what is not zero already, the identity on what is.

    The identity is coupled with nothing, so that a channel with zeros has a positive definite block. Raises the flag
    ``bad`` in place.
    """
    if keep is None:
        return problem.inverse[:, None].clone()
    alive = keep if own_inverses else keep.any(1, keepdim=True)
    if bool(alive.all()):
        return problem.inverse[:, None].clone()
    restricted = problem.damped[:, None] * (alive[..., None] & alive[..., None, :])
    restricted.diagonal(dim1=-2, dim2=-1).add_((~alive).double())
    factor, info = torch.linalg.cholesky_ex(restricted)
    bad |= torch.any(info > 0)
    return torch.cholesky_inverse(factor)


def _scores(weight: Tensor, inverse: Tensor, members: Tensor, gone: Tensor, bad: Tensor) -> Tensor:
    """Cost of every channel, ``[g, C]``; infinite for those that are gone. Raises the flag ``bad`` in place."""
    blocks = inverse[:, :, members[:, :, None], members[:, None, :]]
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(gone[:, None, :, None, None], identity, blocks))
    bad |= torch.any(info > 0)
    columns = weight[..., members].permute(0, 1, 3, 4, 2)
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    return torch.where(gone, torch.inf, half.square().sum((1, 3, 4)) / 2)


def _eliminate_(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Fix ``columns`` of ``weight [P, Q, d]`` at zero under ``inverse [P, d, d]``, in place."""
    rows = inverse[:, columns]
    block, _ = torch.linalg.cholesky_ex(rows[..., columns])
    pivot = torch.linalg.solve_triangular(block, rows, upper=False)
    step = torch.linalg.solve_triangular(block, weight[..., columns].mT, upper=False)
    weight.baddbmm_(step.mT, pivot, alpha=-1)
    inverse.baddbmm_(pivot.mT, pivot, alpha=-1)
    weight[..., columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[..., columns] = 0.0
