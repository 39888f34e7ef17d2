"""1-swaps on masks: bring a removed weight back, remove a kept one instead, as long as the damped loss falls.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns; ``P`` rows searched at once. The number of zeros of every row
(of every N:M group) stays what it is. The change of a swap is exact: with ``q`` back in, removing ``p`` costs
``y'_p²/(2|D'_p|)``, ``y'_p = y_p - T_pq y_q/D_q`` and ``D'_p = D_p - T_pq²/D_q`` (see :mod:`.tableau`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.linalg import resolve_budget, rowwise_product
from lightning_obc.obs.refine.judge import Deadline
from lightning_obc.obs.refine.tableau import SwapState, tableau

CANDIDATES = 8
MATRICES_IN_FLIGHT = 6
RELATIVE_GAIN = 1e-9


@dataclass(frozen=True)
class MaskState:
    """Masks ``[g, R, d]`` after at most ``depth`` swaps a row, and the optimal weights on them (float64)."""

    depth: int
    mask: Tensor
    weight: Tensor


@dataclass(frozen=True)
class SwapProblem:
    """What a search needs to know of a layer.

    Attributes:
        dense: ``[g, R, d]`` target weights.
        hessian: ``[g, d, d]`` float64, damped.
        inverse: ``[g, d, d]`` float64, its inverse.
        mask: ``[g, R, d]`` bool to start from.
        free: ``[g, R, d]`` bool; where False a weight is zero for good and never comes back.
        column_group: ``[d]`` int64 group of every column; swaps stay inside a group. None: anywhere in the row.
    """

    dense: Tensor
    hessian: Tensor
    inverse: Tensor
    mask: Tensor
    free: Tensor
    column_group: Tensor | None = None


def swap(
    problem: SwapProblem,
    *,
    swaps: int = 32,
    depth: Tensor | None = None,
    deadline: Deadline | None = None,
    memory_budget: int | None = None,
) -> Iterator[MaskState]:
    """The path of swaps; the damped loss of a row never rises along it.

    Args:
        problem: The layer.
        swaps: Swaps per row, at most.
        depth: ``[g, R]``; row ``r`` makes only so many swaps.
        deadline: No swap starts after it.
        memory_budget: Bytes of working memory, which bounds the rows searched at once; None takes a share of what is
            free.

    Yields:
        The states at depths 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, … as far as any row moved.
    """
    deadline = deadline or Deadline(None)
    groups, rows, columns = problem.mask.shape
    marks = _marks(swaps)
    masks = problem.mask.reshape(1, -1, columns).repeat(len(marks), 1, 1)
    weights = torch.zeros(masks.shape, dtype=torch.float64, device=masks.device)
    limit = torch.full((groups * rows,), swaps, device=masks.device) if depth is None else depth.flatten()
    budget = resolve_budget(memory_budget, masks.device)
    for chosen in _chunks(problem.mask.reshape(-1, columns), budget):
        _search(problem, chosen, limit[chosen], marks, deadline, masks, weights)
    for index, mark in enumerate(marks):
        if index and torch.equal(masks[index], masks[index - 1]):
            return
        shape = problem.mask.shape
        yield MaskState(mark, masks[index].reshape(shape), weights[index].reshape(shape))


def _marks(swaps: int) -> list[int]:
    """Depths at which the path is recorded: 0, 1, 2, 3, 4, 6, 8, 12, 16, … and the last."""
    marks = [0, 1, 2, 3]
    while marks[-1] < swaps:
        power = 1 << (marks[-1].bit_length() - 1)
        marks.append(power * 2 if marks[-1] > power else power * 3 // 2)
    return [mark for mark in marks if mark < swaps] + [swaps]


def _chunks(mask: Tensor, budget: int) -> list[Tensor]:
    """Rows in chunks of like sparsity that fit the budget."""
    rows, columns = mask.shape
    size = max(1, budget // (MATRICES_IN_FLIGHT * 8 * columns**2))
    order = torch.argsort(mask.sum(1), stable=True)
    return [order[start : start + size] for start in range(0, rows, size)]


def _search(
    problem: SwapProblem,
    chosen: Tensor,
    limit: Tensor,
    marks: list[int],
    deadline: Deadline,
    masks: Tensor,
    weights: Tensor,
) -> None:
    """Search the rows ``chosen [P]`` and record their states at every mark, in place."""
    rows = problem.mask.shape[1]
    which = chosen // rows
    dense, kept, free = (
        part.reshape(-1, part.shape[-1])[chosen] for part in (problem.dense.double(), problem.mask, problem.free)
    )
    base = tableau(problem.hessian, problem.inverse, which, kept)
    state = SwapState.start(base, dense, kept, marks[-1])
    pairs = _AnyPair(state, free) if problem.column_group is None else _GroupPair(state, free, problem.column_group)
    # Gains below this share of the row's own output are rounding errors; two swaps could undo each other for ever.
    floor = RELATIVE_GAIN * (rowwise_product(dense, problem.hessian, which) * dense).sum(-1)
    alive = torch.ones_like(which, dtype=torch.bool)
    done = 0
    for index, mark in enumerate(marks):
        while done < mark and bool(alive.any()) and not deadline.passed():
            enter, leave, change = pairs.best()
            alive = alive & (change < -floor) & (done < limit)
            pairs.apply_(enter, leave, alive)
            done += 1
        masks[index, chosen], weights[index, chosen] = state.kept, state.weight


class _AnyPair:
    """Best swap of a row among its most promising entering columns and all leaving ones."""

    def __init__(self, state: SwapState, free: Tensor) -> None:
        self.state, self.free = state, free

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entering column, leaving column and change of the damped loss, ``[P]`` each; +inf without a swap."""
        state = self.state
        gain = state.saliency.masked_fill(state.kept | ~self.free, -torch.inf)
        best = torch.topk(gain, min(CANDIDATES, gain.shape[1]), dim=1)
        crossing = state.columns(best.indices)
        pivot, here = (part.gather(1, best.indices)[..., None] for part in (state.diagonal, state.linear))
        change = _change(state, crossing, pivot, here, state.linear[:, None], state.diagonal[:, None])
        change = change.masked_fill(~state.kept[:, None] | ~torch.isfinite(best.values)[..., None], torch.inf)
        least = change.flatten(1).min(1)
        columns = gain.shape[1]
        return best.indices.gather(1, (least.indices // columns)[:, None])[:, 0], least.indices % columns, least.values

    def apply_(self, enter: Tensor, leave: Tensor, moving: Tensor) -> None:
        self.state.flip_(enter, moving)
        self.state.flip_(leave, moving)


class _GroupPair:
    """Best swap of a row over all pairs inside a group; the blocks of the tableau within groups are kept current."""

    def __init__(self, state: SwapState, free: Tensor, column_group: Tensor) -> None:
        self.state, self.free = state, free
        self.partner, self.real = _partners(column_group)
        index = self.partner[None, :, :].expand(state.base.shape[0], -1, -1)
        self.blocks = state.base.gather(2, index)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`_AnyPair.best`."""
        state = self.state
        other = state.linear[:, self.partner], state.diagonal[:, self.partner]
        change = _change(state, self.blocks, state.diagonal[..., None], state.linear[..., None], *other)
        possible = (~state.kept & self.free)[..., None] & state.kept[:, self.partner] & self.real
        least = change.masked_fill(~possible, torch.inf).flatten(1).min(1)
        width = self.partner.shape[1]
        enter = least.indices // width
        return enter, self.partner[enter, least.indices % width], least.values

    def apply_(self, enter: Tensor, leave: Tensor, moving: Tensor) -> None:
        for chosen in (enter, leave):
            vector = self.state.flip_(chosen, moving)
            factor = self.state.factors[:, self.state.used - 1, None, None]
            self.blocks -= factor * vector[..., None] * vector[:, self.partner]


def _partners(column_group: Tensor) -> tuple[Tensor, Tensor]:
    """Columns in the group of every column, ``[d, m]``, and which entries are real (short groups are padded)."""
    same = column_group[:, None] == column_group[None, :]
    size = int(same.sum(1).max())
    order = torch.argsort(same.to(torch.int8), dim=1, descending=True, stable=True)[:, :size]
    return order, same.gather(1, order)


def _change(
    state: SwapState, crossing: Tensor, pivot: Tensor, here: Tensor, linear: Tensor, diagonal: Tensor
) -> Tensor:
    """Cost of removing ``p`` once ``q`` is back, less the gain of ``q``; broadcast over pairs."""
    moved = linear - crossing * here / pivot
    left = (diagonal - crossing.square() / pivot).abs()
    return (moved.square() / left - here.square() / pivot) / 2
