"""The sweep over blocks of columns that leave together (paper, section 4, "block-sparsity").

Removing block ``B`` of a row costs ``½ w_Bᵀ (G_BB)⁻¹ w_B = ½ |z|²``, with ``z = L⁻¹ w_B`` and ``G_BB = L Lᵀ``; with the
columns ``V = G[:, B] L⁻ᵀ`` the others move by ``-V z`` and ``G -= V Vᵀ``. Diagonal blocks of ``G`` are kept current,
its rest once a panel. ``numba`` is the CPU default (:mod:`.block_compiled`); it and ``triton`` restart rows whose
pivots have worn out; the panels of batched torch here do not, so they want float64.

Index legend: ``P`` rows in flight, ``b`` blocks alive, ``c`` columns per block, ``M = b·c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_obc.kernels.obs_sweep.dispatch import check_problem, resolve_among
from lightning_obc.kernels.obs_sweep.types import SweepInput, SweepOutput
from lightning_obc.kernels.row_pool import Tensors, by_rows, task
from lightning_obc.linalg import resolve_budget

PANEL = 16
_UNROLLED = 8
# A thread holds the diagonal block of a place in its registers.
LARGEST_TRITON_BLOCK = 8


@dataclass(frozen=True)
class ColumnBlocks:
    """Which columns leave together.

    Attributes:
        members: ``[n, c]`` int64, columns of every block; -1 fills a block that is shorter than the others.
    """

    members: Tensor

    @property
    def size(self) -> int:
        return self.members.shape[1]


def block_backend(backend: str, device_type: str, size: int) -> str:
    """What sweeps blocks of ``size`` columns when ``backend`` is asked for.

    Raises:
        BackendError: ``"triton"`` for blocks of more than 8, or a backend that cannot run there.
    """
    allowed = ("naive", "torch", "numba", "triton") if size <= LARGEST_TRITON_BLOCK else ("naive", "torch", "numba")
    name = resolve_among(backend, device_type, allowed, f"blocks of {size}")
    if name == "numba":
        from lightning_obc.kernels.obs_sweep.block_compiled import LARGEST_BLOCK

        return "numba" if size <= LARGEST_BLOCK else "torch"
    return name


def sweep_blocks(
    problem: SweepInput, blocks: ColumnBlocks, *, backend: str = "auto", memory_budget: int | None = None
) -> SweepOutput:
    """Eliminate all blocks of every row, cheapest first; ties go to the lower block.

    Args:
        problem: Weights ``[g, R, d]`` with the damped Hessian and its inverse. Columns of ``keep=False`` hold zeros and
            are out of every block from the start: they cost nothing and stay zero.
        blocks: The blocks; they cover every column once.
        backend: As of :func:`~lightning_obc.kernels.obs_sweep.sweep_prune`; :func:`block_backend` says what it means.
            ``"naive"`` takes one row and one block at a time in float64, to be read and compared with.
        memory_budget: Bytes of working memory above the inputs; None takes a quarter of what is free.

    Returns:
        ``order`` holds block indices, ``T`` is the number of blocks.

    Raises:
        ShapeError, NonFiniteError, BackendError: As of :func:`~lightning_obc.kernels.obs_sweep.sweep_prune`.
    """
    check_problem(problem)
    groups, rows, columns = problem.weight.shape
    name = block_backend(backend, problem.weight.device.type, blocks.size)
    if groups * rows * len(blocks.members) == 0:
        return _empty(problem, (groups, rows, len(blocks.members)))
    shared = {"inverse": problem.inverse, "hessian": problem.hessian, "members": blocks.members}
    by_row = {"weight": problem.weight, "keep": problem.keep}
    options = {"backend": name, "memory_budget": memory_budget}
    return SweepOutput(**by_rows("obs_sweep_blocks", shared, by_row, options, 2 / 3 * groups * rows * columns**3))


@task("obs_sweep_blocks")
def _sweep_rows(shared: Tensors, by_row: Tensors, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sweep of some of a layer's rows."""
    problem = SweepInput(by_row["weight"], shared["inverse"], shared["hessian"], by_row["keep"])
    blocks = ColumnBlocks(shared["members"])
    budget = resolve_budget(options["memory_budget"], problem.weight.device)
    if options["backend"] == "numba":
        from lightning_obc.kernels.obs_sweep import block_compiled

        return block_compiled.sweep(problem, blocks.members, budget).tensors()
    if options["backend"] == "triton":
        from lightning_obc.kernels.obs_sweep import triton_backend

        return triton_backend.sweep_blocks(problem, blocks.members, budget).tensors()
    groups, rows, _ = problem.weight.shape
    index = torch.arange(groups * rows, device=problem.weight.device)
    if options["backend"] == "naive":
        exact = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian))
        oracle = replace(problem, weight=problem.weight.double(), inverse=exact)
        parts = [_naive_row(*_slots(oracle, blocks, row), blocks.size) for row in index.split(1)]
    else:
        step = max(1, budget // (4 * problem.weight.itemsize * blocks.members.numel() ** 2))
        parts = [_Chunk(*_slots(problem, blocks, rows), blocks.size).run() for rows in index.split(step)]
    order, losses, broken = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = (groups, rows, len(blocks.members))
    count = torch.full(shape[:2], shape[2], dtype=torch.int32, device=order.device)
    losses = losses.reshape(shape).to(problem.weight.dtype)
    return SweepOutput(order.reshape(shape), losses, count, broken.reshape(shape[:2])).tensors()


def _empty(problem: SweepInput, shape: tuple[int, int, int]) -> SweepOutput:
    weight = problem.weight
    order = torch.full(shape, -1, dtype=torch.int32, device=weight.device)
    count = torch.zeros(shape[:2], dtype=torch.int32, device=weight.device)
    return SweepOutput(order, weight.new_zeros(shape), count, count.bool())


def _slots(problem: SweepInput, blocks: ColumnBlocks, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[P, M]`` and ``G`` in the order of the blocks, with ``which [P]``, the ``G`` of every row.

    Missing columns and existing zeros become slots of their own with weight 0 and a unit diagonal.
    """
    per_problem = problem.weight.shape[1]
    slots = blocks.members.flatten().to(rows.device)
    real = slots >= 0
    column = slots.clamp(min=0)
    weight = torch.where(real, problem.weight.flatten(0, 1)[rows][:, column], 0.0)
    if problem.keep is None:
        return weight, _identity_outside(problem.inverse[:, column[:, None], column], real), rows // per_problem
    kept = problem.keep.flatten(0, 1)[rows][:, column] & real
    hessian = problem.hessian[rows // per_problem][:, column[:, None], column]
    factor, _ = torch.linalg.cholesky_ex(_identity_outside(hessian, kept))
    own = torch.arange(len(rows), device=rows.device)
    return torch.where(kept, weight, 0.0), torch.cholesky_inverse(factor).to(weight.dtype), own


def _identity_outside(matrix: Tensor, inside: Tensor) -> Tensor:
    """``[n, M, M]`` with rows and columns of the identity where ``inside`` (``[M]`` or ``[n, M]``) is False."""
    both = inside[..., :, None] & inside[..., None, :]
    return torch.where(both, matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device))


def _naive_row(weight: Tensor, inverse: Tensor, which: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    w, g = weight[0].clone(), inverse[which[0]].clone()
    left = list(range(len(w) // size))
    order, losses = [], []
    while left:
        inside = {block: slice(block * size, (block + 1) * size) for block in left}
        costs = {b: float(w[s] @ torch.linalg.solve(g[s, s], w[s])) / 2 for b, s in inside.items()}
        block = min(left, key=costs.__getitem__)
        s = inside[block]
        solve = torch.linalg.solve(g[s, s], g[s])
        w, g = w - solve.T @ w[s], g - g[:, s] @ solve
        order.append(block)
        losses.append(costs[block])
        left.remove(block)
    broken = ~torch.isfinite(torch.tensor(losses)).all()
    return torch.tensor([order], dtype=torch.int32), torch.tensor([losses], dtype=weight.dtype), broken[None]


class _Chunk:
    """Rows that go through their panels together."""

    def __init__(self, weight: Tensor, inverse: Tensor, which: Tensor, size: int) -> None:
        self.size, self.which = size, which
        self.inverse = inverse
        self.shared = len(inverse) != len(which) or not torch.equal(
            which, torch.arange(len(which), device=which.device)
        )
        self.weight = weight
        self.blocks = torch.arange(weight.shape[1] // size, device=weight.device).expand(len(weight), -1)
        self.broken = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        orders, losses = [], []
        while self.blocks.shape[1]:
            steps = min(PANEL, self.blocks.shape[1])
            panel = _Panel(self, steps)
            for step in range(steps):
                chosen, loss = panel.eliminate(step)
                orders.append(chosen)
                losses.append(loss)
            self._flush(panel)
        return torch.stack(orders, 1).to(torch.int32), torch.stack(losses, 1), self.broken

    def columns(self, block: Tensor) -> Tensor:
        """Slots of one block per row: ``[P, c]``."""
        return block[:, None] * self.size + torch.arange(self.size, device=block.device)

    def rows_of_inverse(self, columns: Tensor) -> Tensor:
        """``G[columns]`` of every row, ``[P, c, M]``, as it was at the last flush; the shared ``G`` is not copied."""
        return self.inverse[self.which[:, None], columns]

    def _flush(self, panel: _Panel) -> None:
        """Take the panel's blocks out: one product, on what is still alive."""
        alive = torch.argsort(panel.dead.to(torch.int8), dim=1, stable=True)[:, : panel.dead.shape[1] - panel.steps]
        slots = (alive[:, :, None] * self.size + torch.arange(self.size, device=alive.device)).flatten(1)
        lines = panel.lines.gather(2, slots[:, None].expand(-1, panel.lines.shape[1], -1))
        kept = self.inverse[self.which[:, None, None], slots[:, :, None], slots[:, None, :]]
        self.inverse = torch.baddbmm(kept, lines.mT, lines, alpha=-1)
        self.which = torch.arange(len(self.weight), device=alive.device)
        self.weight, self.blocks = self.weight.gather(1, slots), self.blocks.gather(1, alive)


class _Panel:
    """A few eliminations between two flushes."""

    def __init__(self, chunk: _Chunk, steps: int) -> None:
        self.chunk, self.steps, size = chunk, steps, chunk.size
        rows, slots = chunk.weight.shape
        self.lines = chunk.weight.new_zeros(rows, steps * size, slots)
        self.dead = torch.zeros(rows, slots // size, dtype=torch.bool, device=chunk.weight.device)
        each = torch.arange(slots, device=chunk.weight.device).reshape(-1, size)
        diagonal = chunk.inverse[:, each[:, :, None], each[:, None, :]].permute(2, 3, 0, 1)
        # [c, c, P, b]: every entry of the small matrices is one contiguous table, for the unrolled factorisation.
        self.diagonal = diagonal[:, :, chunk.which].contiguous()

    def eliminate(self, step: int) -> tuple[Tensor, Tensor]:
        """Remove the cheapest block of every row; returns its original index and its loss, ``[P]`` each."""
        chunk, size = self.chunk, self.chunk.size
        rows = len(chunk.weight)
        weight = chunk.weight.reshape(rows, -1, size)
        scores = block_scores(self.diagonal, weight.permute(2, 0, 1)).masked_fill(self.dead, torch.inf)
        block = torch.nan_to_num(scores, nan=torch.inf).argmin(1)
        columns = chunk.columns(block)
        done = self.lines[:, : step * size]
        before = done.gather(2, columns[:, None].expand(-1, step * size, -1))
        line = torch.baddbmm(chunk.rows_of_inverse(columns), before.mT, done, alpha=-1)
        pivot = line.gather(2, columns[:, None].expand(-1, size, -1))
        factor, info = torch.linalg.cholesky_ex(pivot)
        bad = (info > 0) | ~torch.isfinite(pivot).all(-1).all(-1)
        chunk.broken = chunk.broken | bad
        factor = torch.where(bad[:, None, None], torch.eye(size, dtype=pivot.dtype, device=pivot.device), factor)
        line = torch.linalg.solve_triangular(factor, line, upper=False)
        z = torch.linalg.solve_triangular(factor, chunk.weight.gather(1, columns)[:, :, None], upper=False)
        self.lines[:, step * size : (step + 1) * size] = line
        chunk.weight = (chunk.weight - (line.mT @ z)[:, :, 0]).scatter(1, columns, 0.0)
        parts = line.reshape(rows, size, -1, size).permute(1, 3, 0, 2)
        for part in parts:
            self.diagonal -= part[:, None] * part[None]
        self.dead.scatter_(1, block[:, None], True)
        return chunk.blocks.gather(1, block[:, None])[:, 0], z.square().sum((1, 2)) / 2


def block_scores(diagonal: Tensor, weight: Tensor) -> Tensor:
    """``½ w_Bᵀ (G_BB)⁻¹ w_B`` of many blocks: ``[c, c, P, b]`` and ``[c, P, b]`` to ``[P, b]``."""
    size = len(diagonal)
    if size > _UNROLLED:
        factor, _ = torch.linalg.cholesky_ex(diagonal.permute(2, 3, 0, 1))
        half = torch.linalg.solve_triangular(factor, weight.permute(1, 2, 0)[..., None], upper=False)
        return half.square().sum((2, 3)) / 2
    # Thousands of tiny factorisations: entry by entry over all of them is much faster than one call for each.
    lower: list[list[Tensor]] = [[] for _ in range(size)]
    total = torch.zeros_like(weight[0])
    solved: list[Tensor] = []
    for i in range(size):
        for j in range(i + 1):
            entry = diagonal[i, j].clone()
            for k in range(j):
                entry -= lower[i][k] * lower[j][k]
            lower[i].append(entry.sqrt_() if i == j else entry.div_(lower[j][j]))
        value = weight[i].clone()
        for k in range(i):
            value -= lower[i][k] * solved[k]
        solved.append(value.div_(lower[i][i]))
        total += solved[-1].square()
    return total / 2
