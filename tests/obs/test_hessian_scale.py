"""``scale="hessian"``: weighted range search, then a least-squares refit after the sweep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_obc import obs
from lightning_obc.grid_fitting import fit_grid, refit_scale
from lightning_obc.grids import Grid
from lightning_obc.specs import IntGrid

GRIDS = [
    IntGrid(3, scale="hessian"),
    IntGrid(4, symmetric=True, scale="hessian"),
    IntGrid(3, granularity="tensor", scale="hessian"),
    IntGrid(2, granularity="group", group_size=4, scale="hessian"),
]
every_grid = pytest.mark.parametrize("spec", GRIDS, ids=str)


def problem(groups: int, seed: int = 0, rows: int = 6, columns: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, columns, 3 * columns, generator=generator, dtype=torch.float64)
    return torch.randn(groups, rows, columns, generator=generator), 2 * x @ x.mT / (3 * columns)


def rows_of(weight: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    delta = weight.double() - target.double()
    return torch.einsum("grd,gde,gre->gr", delta, hessian, delta) / 2


@every_grid
@pytest.mark.parametrize("seed", range(4))
def test_refit_is_never_worse(spec: IntGrid, seed: int) -> None:
    weight, hessian = problem(2, seed)
    prepared = obs.prepare(weight, hessian, 0.01)
    solution = obs.quantize(weight, hessian, spec, damping=0.01)
    assert solution.codes is not None
    before = fit_grid(prepared.weight, spec, hessian=prepared.damped).dequantize(solution.codes)
    without, with_refit = (rows_of(part, weight, prepared.damped) for part in (before, solution.weight))
    if spec.granularity == "tensor":
        without, with_refit = without.sum(), with_refit.sum()
    assert bool((with_refit <= without).all())
    assert bool((with_refit < without).any())


@every_grid
def test_refit_is_the_least_squares_optimum(spec: IntGrid) -> None:
    """No small change of any one scale (of the only one, per tensor) lowers the loss."""
    weight, hessian = problem(1)
    grid = fit_grid(weight.double(), spec, hessian=hessian)
    codes = grid.encode(weight.double())
    fitted = refit_scale(grid, codes, weight, hessian)
    best = rows_of(fitted.dequantize(codes), weight, hessian)
    for group in range(fitted.scale.shape[-1]):
        for factor in (0.999, 1.001):
            scale = fitted.scale.clone()
            scale[..., group] *= factor
            moved = Grid(spec, scale, fitted.zero_point, fitted.column_group)
            other = rows_of(moved.dequantize(codes), weight, hessian)
            if spec.granularity == "tensor":
                assert other.sum() > best.sum()
            else:
                assert bool((other > best).all())


def test_scales_that_would_turn_negative_are_kept() -> None:
    weight = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    grid = fit_grid(weight, IntGrid(3, symmetric=True))
    opposite = (2 * grid.zero_point - grid.encode(weight)).clamp(0, 7).to(torch.uint8)
    fitted = refit_scale(grid, opposite, weight, torch.eye(4, dtype=torch.float64)[None])
    assert torch.equal(fitted.scale, grid.scale)


def test_rows_and_groups_on_the_zero_point_keep_their_scale() -> None:
    weight, hessian = problem(1, rows=3, columns=8)
    weight[0, 1] = 0.0
    weight[0, 2, :4] = 0.0
    spec = IntGrid(3, granularity="group", group_size=4)
    grid = fit_grid(weight, spec)
    codes = grid.encode(weight)
    fitted = refit_scale(grid, codes, weight, hessian)
    assert bool(torch.isfinite(fitted.scale).all())
    assert bool((fitted.scale > 0).all())
    assert torch.equal(fitted.scale[0, 1], grid.scale[0, 1])
    assert fitted.scale[0, 2, 0] == grid.scale[0, 2, 0]
    assert fitted.scale[0, 2, 1] != grid.scale[0, 2, 1]


@every_grid
def test_weighted_search_beats_plain_minmax_on_its_own_measure(spec: IntGrid) -> None:
    weight, hessian = problem(1, columns=24)
    hessian = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    weight[0, :, 0] = 40.0
    hessian[0, 0, 0] = 1e-6
    plain = fit_grid(weight, IntGrid(**{**spec.__dict__, "scale": "minmax"}))
    searched = fit_grid(weight, spec, hessian=hessian)
    without, with_search = (rows_of(grid.quantize(weight), weight, hessian).sum() for grid in (plain, searched))
    assert with_search < without
