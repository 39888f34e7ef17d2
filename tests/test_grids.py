"""Fitted integer grids against direct searches."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_obc.errors import PatternError, ShapeError
from lightning_obc.grid_fitting import fit_grid, refit_scale
from lightning_obc.specs import IntGrid

SPECS = [
    IntGrid(bits, symmetric=symmetric, granularity=granularity, group_size=size, scale=scale)
    for bits, symmetric, (granularity, size), scale in itertools.product(
        (1, 2, 3, 4, 8),
        (False, True),
        (("tensor", None), ("channel", None), ("group", 4)),
        ("minmax", "mse", "hessian"),
    )
    if bits > 1 or not symmetric
]


def random_problem(
    seed: int = 0, groups: int = 2, rows: int = 3, columns: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, columns, 4 * columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, columns, generator=generator)
    return weight, inputs @ inputs.mT / columns


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_grid_properties(spec: IntGrid) -> None:
    weight, hessian = random_problem()
    weight[0, 0] = 0.0
    grid = fit_grid(weight, spec, channels=8, hessian=hessian)
    codes = grid.encode(weight)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= spec.max_code
    assert bool((grid.scale > 0).all())
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert bool(((grid.zero_point >= 0) & (grid.zero_point <= spec.max_code)).all())
    # Zero is on every grid, as plus zero, and grid points stay where they are.
    assert torch.equal(
        grid.quantize(torch.zeros_like(weight)).view(torch.int32), torch.zeros_like(weight, dtype=torch.int32)
    )
    points = grid.dequantize(codes)
    assert torch.equal(grid.encode(points), codes)
    # The nearest point of the whole grid, by enumeration.
    every = torch.stack([grid.dequantize(torch.full_like(codes, code)) for code in range(spec.max_code + 1)])
    nearest = (every - weight).abs().amin(0)
    torch.testing.assert_close((points - weight).abs(), nearest, rtol=1e-6, atol=1e-7)


def test_minmax_covers_the_range() -> None:
    weight = torch.tensor([[[-1.0, 0.5, 2.0, 0.25]]])
    grid = fit_grid(weight, IntGrid(4, scale="minmax"))
    assert grid.scale.item() == pytest.approx(3 / 15)
    assert grid.zero_point.item() == 5
    assert (grid.quantize(weight) - weight).abs().max() <= 0.5 * 3 / 15 + 1e-6


def test_symmetric_follows_the_released_quantizer() -> None:
    weight = torch.tensor([[[-1.0, 0.5, 2.0, 0.25]]])
    grid = fit_grid(weight, IntGrid(4, symmetric=True, scale="minmax"))
    assert grid.scale.item() == pytest.approx(2 * 2 / 15)
    assert grid.zero_point.item() == 8


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_search_is_the_first_best_shrink_factor(symmetric: bool) -> None:
    weight = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)) ** 3
    found = fit_grid(weight, IntGrid(3, symmetric=symmetric))
    errors = []
    for step in range(80):
        shrunk = weight.clamp(min=float(weight.min()) * (1 - step / 100), max=float(weight.max()) * (1 - step / 100))
        if symmetric:
            top = float(weight.abs().max()) * (1 - step / 100)
            shrunk = torch.cat([shrunk.clamp(-top, top), torch.tensor([[[top]]])], -1)
        grid = fit_grid(shrunk, IntGrid(3, symmetric=symmetric, scale="minmax"))
        errors.append(float((grid.quantize(weight) - weight).abs().pow(2.4).sum()))
    assert float((found.quantize(weight) - weight).abs().pow(2.4).sum()) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_refit_scale_solves_the_normal_equations(granularity: str) -> None:
    weight, hessian = random_problem(seed=4)
    size = 4 if granularity == "group" else None
    spec = IntGrid(3, granularity=granularity, group_size=size, scale="minmax")  # type: ignore[arg-type]
    grid = fit_grid(weight.double(), spec)
    codes = grid.encode(weight.double())
    refitted = refit_scale(grid, codes, weight.double(), hessian)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        centred = codes.double() - grid.expand(grid.zero_point, 16)
        delta = centred * grid.expand(scale, 16) - weight.double()
        return ((delta @ hessian) * delta).sum()

    assert loss(refitted.scale) < loss(grid.scale)
    free = refitted.scale[:1, :1, :1].clone() if granularity == "tensor" else refitted.scale.clone()
    free.requires_grad_(True)
    loss(free.expand_as(refitted.scale)).backward()
    assert free.grad is not None
    assert float(free.grad.abs().max()) < 1e-9 * float(loss(grid.scale) / grid.scale.min())


def test_refit_chunks_agree() -> None:
    from lightning_obc.grid_fitting import _normal_equations

    weight, hessian = random_problem(rows=7)
    target = weight.double() @ hessian
    whole = _normal_equations(weight.double(), target, hessian, 4)
    parts = _normal_equations(weight.double(), target, hessian, 4, chunk_bytes=1)
    torch.testing.assert_close(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


def test_bad_input() -> None:
    with pytest.raises(PatternError, match="group_size 4"):
        fit_grid(torch.randn(1, 2, 18), IntGrid(4, granularity="group", group_size=4), channels=6)
    with pytest.raises(ShapeError, match="needs the Hessian"):
        fit_grid(torch.randn(1, 2, 4), IntGrid(4, scale="hessian"))
    with pytest.raises(ShapeError, match="weight matrix"):
        fit_grid(torch.randn(2, 4), IntGrid(4))


def test_subnormal_rows_do_not_break_the_encoder() -> None:
    weight = torch.full((1, 1, 4), 1e-44)
    grid = fit_grid(weight, IntGrid(8))
    assert bool(torch.isfinite(grid.quantize(weight)).all())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("exponent", [-80, 60])
def test_search_finds_the_same_range_for_weights_of_any_scale(exponent: int, granularity: str) -> None:
    """Powers of errors would leave float32; a factor of two to some power changes no digit of a weight."""
    weight = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    unit = 2.0**exponent
    spec = IntGrid(3, granularity=granularity)
    grid, scaled = fit_grid(weight, spec), fit_grid(weight * unit, spec)
    # Neighbouring ranges of the search are 1 % apart.
    torch.testing.assert_close(scaled.scale / unit, grid.scale, rtol=1e-3, atol=0)
    assert torch.equal(scaled.zero_point, grid.zero_point)
