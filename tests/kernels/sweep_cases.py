"""Problems and comparisons shared by the tests of the sweep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_obc.kernels.obs_sweep import (
    ColumnBlocks,
    GridInput,
    NMGroups,
    SweepInput,
    SweepOutput,
    sweep_blocks,
    sweep_prune,
    sweep_quantize,
)
from lightning_obc.linalg import safe_inverse
from lightning_obc.obs.block_sweep import block_members


def make_problem(
    groups: int,
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.float64,
    damping: float = 1e-2,
    samples: int | None = None,
    keep: float | None = None,
    seed: int = 0,
) -> SweepInput:
    """Rectified, correlated inputs, as a layer behind a ReLU sees; ``keep`` is the share of weights not yet pruned."""
    generator = torch.Generator().manual_seed(seed)
    samples = samples or 2 * columns + 3
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(groups, columns, samples, generator=generator, dtype=torch.float64)
    x = (x + mix @ x).clamp(min=0)
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64) / columns**0.5
    mask = None
    if keep is not None:
        mask = torch.rand(groups, rows, columns, generator=generator) < keep
        weight = weight * mask
    result = safe_inverse(2 * x @ x.mT / samples, damping)
    return SweepInput(weight.to(dtype), result.inverse.to(dtype), result.damped_hessian, mask)


def in_dtype(problem: SweepInput, dtype: torch.dtype) -> SweepInput:
    return replace(problem, weight=problem.weight.to(dtype), inverse=problem.inverse.to(dtype))


def make_grid(weight: Tensor, bits: int, symmetric: bool, shared: str = "channel") -> GridInput:
    """Min-max grids, shrunk by 0.8 so that some weights are clipped; one for each row, for all of the rows, or for each
    five columns of a row."""
    if shared == "columns":
        parts = [make_grid(part, bits, symmetric) for part in weight.split(5, 2)]
        scale, zero = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("scale", "zero_point"))
        return GridInput(scale, zero, parts[0].max_code)
    top, over = 2**bits - 1, (0, 1, 2) if shared == "tensor" else (2,)
    low, high = weight.amin(over, keepdim=True).clamp(max=0), weight.amax(over, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = 0.8 * (high - low).clamp(min=1e-3) / top
    zero = torch.full_like(scale, (top + 1) // 2) if symmetric else torch.round(-0.8 * low / scale).clamp(0, top)
    return GridInput(scale.expand_as(weight), zero.expand_as(weight), top)


def make_groups(columns: int, kept: int, size: int) -> NMGroups:
    """Consecutive groups; a shorter last group may lose ``size - kept`` of its columns, but keeps at least one."""
    column_group = torch.arange(columns) // size
    members = torch.bincount(column_group)
    return NMGroups(column_group, (members - 1).clamp(max=size - kept))


@dataclass(frozen=True)
class Mode:
    """One way to sweep, by name."""

    name: str
    bits: int = 0
    symmetric: bool = False
    pattern: tuple[int, int] | None = None
    block: int = 0
    shared: str = "channel"

    def run(self, problem: SweepInput, backend: str, memory_budget: int | None = None) -> SweepOutput:
        device = problem.weight.device
        if self.bits:
            grid = self.grid(problem.weight.cpu())
            grid = replace(grid, scale=grid.scale.to(device), zero_point=grid.zero_point.to(device))
            return sweep_quantize(problem, grid, backend=backend, memory_budget=memory_budget)
        if self.block:
            return sweep_blocks(problem, self.blocks(problem), backend=backend, memory_budget=memory_budget)
        groups = None
        if self.pattern:
            groups = make_groups(problem.weight.shape[2], *self.pattern)
            groups = NMGroups(groups.column_group.to(device), groups.quota.to(device))
        return sweep_prune(problem, groups=groups, backend=backend, memory_budget=memory_budget)

    def grid(self, weight: Tensor) -> GridInput:
        return make_grid(weight, self.bits, self.symmetric, self.shared)

    def blocks(self, problem: SweepInput) -> ColumnBlocks:
        """Consecutive columns; the last block is short where they do not divide."""
        columns = problem.weight.shape[2]
        return ColumnBlocks(block_members(columns, columns, self.block, problem.weight.device))


MODES = [
    Mode("unstructured"),
    Mode("2:4", pattern=(2, 4)),
    Mode("1:4", pattern=(1, 4)),
    Mode("4:8", pattern=(4, 8)),
    Mode("int2 asymmetric by tensor", bits=2, shared="tensor"),
    Mode("int4 symmetric by columns", bits=4, symmetric=True, shared="columns"),
    Mode("int8 asymmetric", bits=8),
]
# Triton has blocks of at most 8.
BLOCKS = [Mode("block 4", block=4), Mode("block 9", block=9)]


def direct_loss(problem: SweepInput, out: SweepOutput, mode: Mode) -> Tensor:
    """``½ Δw H Δwᵀ`` of every row ``[g, R]`` in float64, from the final weights that the record implies."""
    weight, hessian = problem.weight.double(), problem.hessian
    if mode.bits:
        grid = mode.grid(problem.weight)
        assert out.codes is not None
        step = weight - (out.codes.double() - grid.zero_point.double()) * grid.scale.double()
    else:
        step = torch.zeros_like(weight)
        for g, r in torch.cartesian_prod(torch.arange(weight.shape[0]), torch.arange(weight.shape[1])).tolist():
            gone = out.order[g, r, : int(out.count[g, r])].long()
            if mode.block:
                gone = mode.blocks(problem).members[gone]
                gone = gone[gone >= 0]
            inverse = torch.linalg.inv(hessian[g])
            move = torch.linalg.solve(inverse[gone][:, gone], weight[g, r, gone])
            step[g, r] = inverse[:, gone] @ move
    return ((step @ hessian) * step).sum(-1) / 2


def agreement(a: SweepOutput, b: SweepOutput) -> float:
    """Share of steps at which two sweeps eliminate the same column."""
    return (a.order == b.order).double().mean().item() if a.order.numel() else 1.0


def assert_parity(got: SweepOutput, oracle: SweepOutput, *, order: float, loss: float) -> None:
    """Same columns, in the same order, for at least ``order`` of all steps (and as many codes); every row's summed loss
    within ``loss``, relative.

    A row that once takes the other of two near-equal columns may go on differently: other losses step by step, but its
    sum has no excuse.
    """
    assert not bool(got.broken.any())
    assert torch.equal(got.count, oracle.count)
    steps = torch.arange(got.order.shape[2])
    assert torch.equal(got.order >= 0, steps < got.count[..., None])
    assert agreement(got, oracle) >= order
    total, expected = got.losses.double().sum(-1), oracle.losses.double().sum(-1)
    torch.testing.assert_close(total, expected, rtol=loss, atol=1e-30)
    if oracle.codes is not None:
        assert got.codes is not None
        assert (got.codes == oracle.codes).double().mean().item() >= order
