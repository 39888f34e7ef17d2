"""The sweep in panels of batched torch, for any device and both precisions.

Every row of a chunk takes one step at a time with the others. A panel of ``B`` steps forms only its pivot columns
``v = (G_:p - V V_pᵀ)/√·`` and keeps weights and diagonal current; at its end one batched product brings ``G`` up to
date and the columns that left are dropped. Nothing per row is copied before the first such flush. Rows that have ended
idle: no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_obc.kernels.obs_sweep.dispatch import empty_output
from lightning_obc.kernels.obs_sweep.types import (
    OUTLIER_TOLERANCE,
    REFRESH,
    WORN_FLOAT32,
    SweepOutput,
    SweepPlan,
    cheaper_to_invert,
)
from lightning_obc.linalg import padded_columns, rowwise_product, submatrix

_STEPS = 32


def sweep(plan: SweepPlan) -> SweepOutput:
    """Run the plan in chunks of rows whose ``G`` fit the memory budget."""
    out = empty_output(plan)
    groups, rows, columns = plan.problem.weight.shape
    each = 3 * columns * (columns + 2 * _STEPS) * plan.problem.weight.element_size()
    size = max(1, min(groups * rows, plan.memory_budget // each))
    with _exact_float32(plan.problem.weight.device):
        for chosen in torch.arange(groups * rows, device=plan.problem.weight.device).split(size):
            chunk = _Chunk(plan, chosen)
            chunk.run()
            out.order.flatten(0, 1)[chosen] = chunk.order[:, : plan.steps]
            out.losses.flatten(0, 1)[chosen] = chunk.losses[:, : plan.steps]
            out.count.view(-1)[chosen] = chunk.done.to(torch.int32)
            out.broken.view(-1)[chosen] = chunk.broken
            if out.codes is not None:
                out.codes.flatten(0, 1)[chosen] = chunk.codes
    return out


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """No TF32, no autocast, no autograd, whatever the caller's settings."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _Chunk:
    """``P`` rows in flight, ``m`` columns each in the working set, ascending; see the types for the other letters."""

    def __init__(self, plan: SweepPlan, chosen: Tensor) -> None:
        source, grid, groups = plan.problem, plan.grid, plan.groups
        rows, columns = source.weight.shape[1:]
        self.plan, self.source = plan, source
        self.problem = chosen // rows
        self.dense = source.weight.reshape(-1, columns)[chosen]
        size, device = len(chosen), self.dense.device
        self.weight = self.dense.clone()
        self.inverse: Tensor | None = None
        self.column = torch.arange(columns, device=device).expand(size, columns)
        self.alive = torch.ones(size, columns, dtype=torch.bool, device=device)
        self.left = columns  # the most columns alive in any row
        self.fixed = torch.zeros_like(self.alive)
        self.target = torch.zeros_like(self.dense)
        self.zeros: Tensor | None = None
        if source.keep is not None:
            self.zeros = ~source.keep.reshape(-1, columns)[chosen]
        self.scale, self.zero_point = torch.ones_like(self.dense), self.target
        if grid is not None:
            self.scale = grid.scale.reshape(-1, columns)[chosen]
            self.zero_point = grid.zero_point.reshape(-1, columns)[chosen]
            self.codes = torch.zeros(size, columns, dtype=torch.uint8, device=device)
        if groups is not None:
            self.made = torch.zeros(size, len(groups.quota), dtype=torch.int64, device=device)
        self.diagonal = source.inverse.diagonal(dim1=1, dim2=2)[self.problem].clone()
        self.reference = self.diagonal.clone()  # the diagonal changes in place
        self.fresh = torch.ones(size, dtype=torch.bool, device=device)  # no step since the last float64 start
        # One column more than T takes the writes of rows that idle.
        self.order = torch.full((size, plan.steps + 1), -1, dtype=torch.int32, device=device)
        self.losses = torch.zeros(size, plan.steps + 1, dtype=self.dense.dtype, device=device)
        self.done = torch.zeros(size, dtype=torch.int64, device=device)
        self.broken = torch.zeros(size, dtype=torch.bool, device=device)
        info = torch.finfo(self.dense.dtype)
        self.worn_ratio = WORN_FLOAT32 * torch.finfo(torch.float32).eps / info.eps

    def run(self) -> None:
        if self.zeros is not None and cheaper_to_invert(self.dense.shape[1], int(self.zeros.sum(1).min())):
            self._take_zeros()
        begun = self.left
        while self.left > 0:
            panel, worn = self._panel(min(_STEPS, self.left))
            # The only waits for the device: here and in the flush, once a panel.
            some_worn = bool(worn.any())
            if not self._flush(panel, some_worn):
                return
            few = self.plan.groups is None and REFRESH * self.left <= begun
            begun = self.left if few else begun
            if some_worn or few:
                self._restart((self.alive.any(1) if few else worn).nonzero().flatten())
        self.broken |= ~torch.isfinite(self.losses[:, :-1]).all(1)

    # ------------------------------------------------------------------------------------ one panel of steps
    def _panel(self, steps: int) -> tuple[Tensor, Tensor]:
        """``V`` ``[P, steps, m]`` of a panel, and the rows whose pivots have worn out: those idle until its end."""
        panel = self.weight.new_zeros(len(self.weight), steps, self.weight.shape[1])
        worn = torch.zeros_like(self.broken)
        for step in range(steps):
            error, candidate = self._errors()
            pivot, active = self._choose(error, candidate)
            value = self.diagonal.gather(1, pivot)
            sound = (value > 0) & torch.isfinite(value)
            sound &= self.reference.gather(1, pivot) <= self.worn_ratio * value
            bad = (active & ~sound)[:, 0]
            self.broken |= bad & self.fresh
            worn |= bad & ~self.fresh
            sound &= active & ~worn[:, None]
            self.fresh &= ~sound[:, 0]
            root = torch.where(sound, value, 1).sqrt()
            z = torch.where(sound, error.gather(1, pivot) / root, 0)
            self._record(pivot, z, sound)
            v = self._pivot_column(pivot, panel[:, :step]) / root
            v = torch.where(sound, v, 0)
            panel[:, step] = v
            self.weight -= z * v
            self.diagonal -= v * v
            self.diagonal.scatter_(1, pivot, 1)
            self.alive &= ~self.broken[:, None]
        return panel, worn

    def _errors(self) -> tuple[Tensor, Tensor]:
        """``w - q`` of every position, and which positions may be fixed next."""
        candidate = self.alive
        if self.plan.groups is not None:
            open_group = (self.made < self.plan.groups.quota).gather(1, self.plan.groups.column_group[self.column])
            candidate = candidate & (open_group if self.zeros is None else open_group | self.zeros)
        if self.plan.grid is None:
            return self.weight, candidate
        return self.weight - (self._codes() - self.zero_point) * self.scale, candidate

    def _codes(self) -> Tensor:
        assert self.plan.grid is not None
        return torch.clamp(torch.round(self.weight / self.scale) + self.zero_point, 0, self.plan.grid.max_code)

    def _choose(self, error: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """Position of the pivot ``[P, 1]`` and whether there is one. ``argmin`` returns the first among equals."""
        square = error.square()
        score = square / self.diagonal
        if self.plan.grid is not None:
            raw = torch.round(self.weight / self.scale) + self.zero_point
            clipped = (raw < 0) | (raw > self.plan.grid.max_code)
            outlier = clipped & (square > (0.5 * (1 + OUTLIER_TOLERANCE)) ** 2 * self.scale.square())
            score = torch.where(outlier, -square, score)
        if self.zeros is not None:
            score = score.masked_fill(self.zeros, -torch.inf)
        score = torch.where(candidate, score, torch.inf)
        return score.argmin(1, keepdim=True), candidate.any(1, keepdim=True)

    def _record(self, pivot: Tensor, z: Tensor, sound: Tensor) -> None:
        column = self.column.gather(1, pivot)
        slot = torch.where(sound, self.done[:, None], self.plan.steps)
        self.order.scatter_(1, slot, column.to(torch.int32))
        self.losses.scatter_(1, slot, z * z / 2)
        self.done += sound[:, 0]
        self.fixed.scatter_(1, column, self.fixed.gather(1, column) | sound)
        self.alive.scatter_(1, pivot, self.alive.gather(1, pivot) & ~sound)
        if self.zeros is not None:
            self.zeros.scatter_(1, pivot, self.zeros.gather(1, pivot) & ~sound)
        if self.plan.groups is not None:
            self.made.scatter_add_(1, self.plan.groups.column_group[column], sound.to(torch.int64))
        if self.plan.grid is not None:
            code, zero_point = self._codes().gather(1, pivot), self.zero_point.gather(1, pivot)
            value = (code - zero_point) * self.scale.gather(1, pivot)
            self.target.scatter_(1, column, torch.where(sound, value, self.target.gather(1, column)))
            self.codes.scatter_(1, column, torch.where(sound, code.to(torch.uint8), self.codes.gather(1, column)))

    def _pivot_column(self, pivot: Tensor, panel: Tensor) -> Tensor:
        row = torch.arange(len(pivot), device=pivot.device)
        if self.inverse is None:
            column = self.source.inverse[self.problem, pivot[:, 0]]
        else:
            column = self.inverse[row, pivot[:, 0]]
        if panel.shape[1] == 0:
            return column
        left = panel.gather(2, pivot[:, None, :].expand(-1, panel.shape[1], 1))
        return torch.baddbmm(column[:, None, :], left.mT, panel, alpha=-1)[:, 0]

    # ------------------------------------------------------------------------------------- between panels
    def _flush(self, panel: Tensor, some_worn: bool) -> bool:
        """Bring ``G`` up to date and drop columns that left. Returns whether any row goes on."""
        size = self.alive.shape[1]
        if self.plan.groups is None and not some_worn:
            smaller = self.left - panel.shape[1]
        else:
            self.alive &= self._errors()[1]
            smaller = int(self.alive.sum(1).max())
        self.left = smaller
        if smaller == 0:
            return False
        if self.inverse is None or smaller <= 0.85 * size:
            # Gathering costs as much as the product it saves, until enough columns have left.
            panel = self._compact(smaller, panel)
        assert self.inverse is not None
        self.inverse.baddbmm_(panel.mT, panel, alpha=-1)
        self.diagonal = torch.where(self.alive, self.inverse.diagonal(dim1=1, dim2=2), 1)
        return True

    def _compact(self, size: int, panel: Tensor) -> Tensor:
        kept = torch.argsort(self.alive.to(torch.int8), dim=1, descending=True, stable=True)[:, :size]
        if self.inverse is None:
            # Before the first flush positions are columns.
            self.inverse = self.source.inverse[self.problem[:, None, None], kept[:, :, None], kept[:, None, :]]
        else:
            row = torch.arange(len(kept), device=kept.device)[:, None, None]
            self.inverse = self.inverse[row, kept[:, :, None], kept[:, None, :]]
        self._take(kept)
        return panel.gather(2, kept[:, None, :].expand(-1, panel.shape[1], -1))

    def _take(self, kept: Tensor) -> None:
        """Keep these positions ``[P, m']``."""
        for name in ("weight", "column", "alive", "reference", "diagonal", "zeros", "scale", "zero_point"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.gather(1, kept))

    # ------------------------------------------------------------------------------------------- restarts
    def _take_zeros(self) -> None:
        """Record the weights that are zero already, and start from the inverse on the others."""
        assert self.zeros is not None
        columns, real = padded_columns(self.zeros)
        self.order[:, : columns.shape[1]] = torch.where(real, columns, -1).to(torch.int32)
        self.done = real.sum(1)
        self.fixed = self.zeros
        if self.plan.groups is not None:
            group = self.plan.groups.column_group.expand_as(self.zeros)
            self.made.scatter_add_(1, group, self.zeros.to(torch.int64))
        if self.plan.grid is not None:
            self.codes = torch.where(self.zeros, self.zero_point, 0).to(torch.uint8)
        self.alive, self.zeros = ~self.zeros, None
        self.alive &= self._errors()[1]
        size = self.left = int(self.alive.sum(1).max())
        self._take(torch.argsort(self.alive.to(torch.int8), dim=1, descending=True, stable=True)[:, :size])
        self.inverse = self.dense.new_zeros(len(self.dense), size, size)
        if size > 0:
            self._restart(torch.arange(len(self.dense), device=self.dense.device))

    def _restart(self, rows: Tensor) -> None:
        """``G`` and weights of these rows from the float64 inverse of ``H`` on their free columns."""
        assert self.inverse is not None
        widest = max(self.alive.shape[1], int((~self.fixed[rows]).sum(1).max()))
        each = 32 * widest**2 + 64 * self.dense.shape[1]
        for part in rows.split(max(1, self.plan.memory_budget // (4 * each))):
            self._restart_part(part)
        self.diagonal = torch.where(self.alive, self.inverse.diagonal(dim1=1, dim2=2), 1)
        self.reference = self.reference.index_copy(0, rows, self.diagonal[rows])
        self.fresh[rows] = True

    def _restart_part(self, rows: Tensor) -> None:
        """With ``F`` the fixed columns at ``q``: ``w_U = w₀_U + H_UU⁻¹ H_UF (w₀_F - q_F)``."""
        assert self.inverse is not None
        hessian, problem = self.source.hessian, self.problem[rows]
        free, real = padded_columns(~self.fixed[rows])
        factor, info = torch.linalg.cholesky_ex(submatrix(hessian, problem, free, real))
        inverse = torch.cholesky_inverse(factor)
        moved = (self.dense[rows] - self.target[rows]).double() * self.fixed[rows]
        right = rowwise_product(moved, hessian, problem).gather(1, free) * real
        step = (inverse @ right[:, :, None])[:, :, 0]
        rank = torch.zeros_like(self.fixed[rows], dtype=torch.int64)
        rank.scatter_(1, free, torch.arange(free.shape[1], device=free.device).expand_as(free))
        column, alive = self.column[rows], self.alive[rows]
        here = torch.where(alive, rank.gather(1, column), 0)
        row = torch.arange(len(rows), device=rows.device)[:, None, None]
        both = alive[:, :, None] & alive[:, None, :]
        self.inverse[rows] = torch.where(both, inverse[row, here[:, :, None], here[:, None, :]], 0).to(self.dense.dtype)
        weight = (self.dense[rows].gather(1, column).double() + step.gather(1, here)).to(self.dense.dtype)
        self.weight[rows] = torch.where(alive, weight, 0)
        self.broken[rows] |= info != 0
        self.alive[rows] &= (info == 0)[:, None]
