"""One full elimination of a layer's blocks: every block level follows from it (paper, section 4, "block-sparsity")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.brief import Brief
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.curves import POINTS, Curve, heap_curve
from lightning_obc.obs.problem import HessianLike, Problem, check_channels, prepare
from lightning_obc.obs.running import run_with_retries
from lightning_obc.obs.select import masks_from_order, row_counts, zeros_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.obs.sweep import existing_zeros, in_units, solve_mask
from lightning_obc.specs import Block, Selection


@dataclass(frozen=True, repr=False)
class BlockSweep(Brief):
    """Elimination order and losses of the blocks of every row.

    Attributes:
        order: ``[g, R, n]`` int32, the block that goes at each step.
        losses: Same shape, the increase of the damped loss at each step.
        members: ``[n, c]`` int64, columns of every block; -1 where a block is short.
        alive: ``[g, R, d]`` bool, weights that are not zero already.
        problem: The prepared problem.
        backend: The backend that ran.
        memory_budget: Bytes for the working memory of refits, None for a share of what is free.
    """

    order: Tensor
    losses: Tensor
    members: Tensor
    alive: Tensor
    problem: Problem
    backend: str
    memory_budget: int | None = None

    def mask(self, sparsity: float, selection: Selection = "heap") -> Tensor:
        """Keep-mask ``[g, R, d]`` once the cheapest blocks of the layer are gone; blocks of zeros count already.

        Raises:
            SpecError: ``sparsity`` outside [0, 1).
        """
        Block(1, sparsity)
        count = len(self.members)
        flat = self._padded()
        fixed = self._fixed(flat)
        losses, order = self.losses.reshape(-1, count), self.order.reshape(-1, count)
        counts = row_counts(losses, zeros_for(sparsity, losses.numel()), selection, fixed)
        kept = masks_from_order(order, counts)
        flat[:, self.members.flatten()] &= kept.repeat_interleave(self.members.shape[1], dim=1)
        return flat[:, :-1].reshape(self.alive.shape)

    def _padded(self) -> Tensor:
        """``alive`` of all rows; a spare last column stands for those that short blocks lack (index -1)."""
        rows = self.alive.flatten(0, 1)
        return torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)

    def _fixed(self, flat: Tensor) -> Tensor:
        """Blocks of every row that are zero already."""
        return (~flat[:, self.members].any(-1)).sum(1)

    def loss_curve(self, points: int = POINTS) -> Curve:
        """The layer's damped loss over the share of its blocks that are gone, before any refit."""
        return heap_curve(self.losses.flatten(0, 1), int(self._fixed(self._padded()).sum()), points)

    def solution(self, sparsity: float, selection: Selection = "heap") -> LayerSolution:
        """The layer with a share of its blocks gone: weights by an exact solve on the mask.

        Args:
            sparsity: Share of blocks that are gone, in [0, 1).
            selection: How zeros spread over the rows: ``"heap"`` (the paper), ``"sorted"`` or ``"hull"``.

        Raises:
            SpecError: ``sparsity`` outside [0, 1).
        """
        return solve_mask(self.problem, self.mask(sparsity, selection), self.backend, self.memory_budget)


def sweep_blocks(
    weight: Tensor,
    hessian: HessianLike,
    size: int,
    *,
    channels: int | None = None,
    damping: float = 0.01,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> BlockSweep:
    """Eliminate every block of ``size`` consecutive input channels of every row in OBS order.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``; weights that are zero already stay zero.
        hessian: ``[d, d]``, ``[g, d, d]`` or the two-half statistic, undamped.
        size: Columns of a block.
        channels: Input channels per kernel position; default ``d``. The last block of a position may be short.
        damping: Share of ``mean(diag H)`` added to the diagonal.
        backend: As of :func:`lightning_obc.obs.sweep`; ``"triton"`` has blocks of at most 8.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Raises:
        PatternError: ``channels`` does not divide the columns.
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: See :func:`lightning_obc.obs.prepare`.
    """
    Block(size, 0.0)
    backend = obs_sweep.block_backend(backend, weight.device.type, size)
    channels = check_channels(weight.shape[-1], channels)
    return sweep_blocks_prepared(prepare(weight, hessian, damping), size, channels, backend, memory_budget)


def sweep_blocks_prepared(
    problem: Problem, size: int, channels: int, backend: str, memory_budget: int | None = None
) -> BlockSweep:
    """:func:`sweep_blocks` of a problem that is prepared already; ``backend`` is resolved."""
    members = block_members(problem.weight.shape[-1], channels, size, problem.weight.device)
    keep, blocks = existing_zeros(problem), obs_sweep.ColumnBlocks(members)
    name = obs_sweep.block_backend(backend, problem.weight.device.type, size)

    def kernel(problem: Problem) -> obs_sweep.SweepOutput:
        swept = problem.sweep_input(keep)
        return obs_sweep.sweep_blocks(swept, blocks, backend=name, memory_budget=memory_budget)

    if name not in ("numba", "triton"):  # the others never restart a row
        problem = problem.with_dtype(torch.float64)
    problem, output = run_with_retries(problem, kernel)
    alive = torch.ones_like(problem.weight, dtype=torch.bool) if keep is None else keep
    losses = in_units(output.losses, problem.units())
    return BlockSweep(output.order, losses, members, alive, problem, name, memory_budget)


def block_members(columns: int, channels: int, size: int, device: torch.device) -> Tensor:
    """Columns of every block of ``size`` consecutive input channels, ``[blocks, size]``; -1 where a block is short."""
    per_position = math.ceil(channels / size)
    padded = torch.arange(per_position * size, device=device)
    channel = torch.where(padded < channels, padded, -1)
    start = torch.arange(0, columns, channels, device=device)[:, None]
    return torch.where(channel < 0, -1, start + channel).reshape(-1, size)
