"""Bad input: the right answer or a named error, for pruning and for quantization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import (
    NonFiniteError,
    NotPositiveDefiniteError,
    OBCError,
    PatternError,
    ShapeError,
    SpecError,
)
from lightning_obc.hessian import Hessian
from lightning_obc.specs import IntGrid

SOLVERS: dict[str, Callable[..., obs.LayerSolution]] = {
    "half": lambda weight, hessian, **options: obs.prune(weight, hessian, 0.5, **options),
    "nm": lambda weight, hessian, **options: obs.prune(weight, hessian, "2:4", **options),
    "int4": lambda weight, hessian, **options: obs.quantize(weight, hessian, 4, **options),
    "int2 refined": lambda weight, hessian, **options: obs.quantize(weight, hessian, 2, refine=True, **options),
    "half refined": lambda weight, hessian, **options: obs.prune(weight, hessian, 0.5, refine=True, **options),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def problem(rows: int = 6, columns: int = 12, samples: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, samples, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator), 2 * x @ x.T / samples


def sane(solution: obs.LayerSolution, weight: Tensor, hessian: Tensor) -> None:
    """Finite weights on their mask, a loss that is the measured one, and not worse than zeroing everything."""
    assert solution.weight.shape == weight.shape
    assert solution.weight.dtype == weight.dtype
    assert bool(torch.isfinite(solution.weight).all())
    assert not bool((solution.weight[~solution.mask] != 0).any())
    delta = solution.weight.double() - weight.double()
    loss = float(((delta @ hessian) * delta).sum() / 2)
    assert solution.loss == pytest.approx(loss, rel=1e-8, abs=1e-10)
    assert solution.loss + solution.damping_loss <= solution.reference * 1.2 + 1e-9


@every_solver
def test_indefinite_hessians_are_named(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    hessian -= 2 * torch.eye(12, dtype=torch.float64) * hessian.diagonal().max()
    with pytest.raises(NotPositiveDefiniteError, match="Remedy: raise damping"):
        solver(weight, hessian)


@every_solver
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01])
def test_fewer_samples_than_columns(solver: Callable[..., obs.LayerSolution], damping: float) -> None:
    weight, hessian = problem(samples=5)
    solution = solver(weight, hessian, damping=damping)
    sane(solution, weight, hessian)
    if damping == 0:
        assert solution.status.damping > 0
        assert "Cholesky failed" in str(solution.status)


@every_solver
def test_constant_and_repeated_columns(solver: Callable[..., obs.LayerSolution]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 48, generator=generator, dtype=torch.float64)
    x[3], x[4] = 5.0, 5.0
    x[7] = x[6]
    weight, hessian = torch.randn(6, 12, generator=generator), 2 * x @ x.T / 48
    sane(solver(weight, hessian), weight, hessian)


@every_solver
def test_dead_columns_are_counted_and_cost_nothing(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    hessian[[2, 5]] = 0
    hessian[:, [2, 5]] = 0
    solution = solver(weight, hessian)
    sane(solution, weight, hessian)
    assert solution.status.dead == 2


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30])
def test_a_group_whose_inputs_are_all_zero_goes_first_whatever_the_scale_of_the_others(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 40, generator=generator, dtype=torch.float64)
    hessian = torch.stack([x @ x.mT * scale, torch.zeros(8, 8, dtype=torch.float64)])
    weight = torch.randn(2, 3, 8, generator=generator)
    solution = obs.prune(weight, hessian, 0.5)
    assert not bool(solution.mask[1].any())
    assert bool(solution.mask[0].all())
    assert solution.loss == 0


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, hessian = problem()
    hessian[2] = 0
    hessian[:, 2] = 0
    solution = obs.quantize(weight, hessian, 4)
    assert solution.grid is not None
    assert torch.equal(solution.weight[:, 2], solution.grid.quantize(weight[None])[0, :, 2])


@every_solver
def test_all_inputs_zero(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    solution = solver(weight, 0 * hessian)
    assert solution.loss == 0
    assert solution.relative_error == 0
    assert bool(torch.isfinite(solution.weight).all())


@every_solver
def test_a_row_of_zeros_stays_zero(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    weight[2] = 0.0
    solution = solver(weight, hessian)
    sane(solution, weight, hessian)
    assert torch.equal(solution.weight[2], torch.zeros(12))
    assert not torch.signbit(solution.weight[2]).any()


@every_solver
def test_all_weights_zero(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    solution = solver(0 * weight, hessian)
    assert torch.equal(solution.weight, torch.zeros_like(weight))
    assert solution.loss == 0


@pytest.mark.parametrize("refine", [False, True])
def test_one_bit(refine: bool) -> None:
    weight, hessian = problem()
    solution = obs.quantize(weight, hessian, 1, refine=refine)
    sane(solution, weight, hessian)
    assert int(max(len(row.unique()) for row in solution.weight)) <= 2
    with pytest.raises(SpecError, match="too few bits"):
        obs.quantize(weight, hessian, IntGrid(1, symmetric=True))


@pytest.mark.parametrize("bits", [0, 9, 2.5, True])
def test_impossible_bits(bits: float) -> None:
    with pytest.raises(SpecError, match="bit width"):
        obs.quantize(*problem(), bits)  # type: ignore[arg-type]


@every_solver
@pytest.mark.parametrize(("rows", "columns"), [(1, 12), (5, 4), (1, 4)])
def test_one_row(solver: Callable[..., obs.LayerSolution], rows: int, columns: int) -> None:
    weight, hessian = problem(rows, columns)
    sane(solver(weight, hessian), weight, hessian)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("refine", [False, True])
def test_one_column(rows: int, refine: bool) -> None:
    weight, hessian = problem(rows, 1)
    pruned = obs.prune(weight, hessian, 0.5, refine=refine)
    assert int((~pruned.mask).sum()) == -(-rows // 2)
    smallest = weight.abs().flatten().argsort()[: -(-rows // 2)]
    assert not bool(pruned.mask.flatten()[smallest].any())
    sane(obs.quantize(weight, hessian, 4, refine=refine), weight, hessian)
    with pytest.raises(PatternError, match="multiple of 4"):
        obs.prune(weight, hessian, "2:4")


@every_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(solver: Callable[..., obs.LayerSolution], dtype: torch.dtype) -> None:
    weight, hessian = problem()
    narrow = weight.to(dtype)
    solution = solver(narrow, hessian)
    sane(solution, narrow, hessian)
    wide = solver(narrow.float(), hessian)
    assert torch.equal(solution.mask, wide.mask)
    torch.testing.assert_close(solution.weight, wide.weight.to(dtype))


@every_solver
def test_non_contiguous_tensors(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    crooked = weight.T.contiguous().T
    padded = torch.zeros(24, 24, dtype=torch.float64)
    padded[::2, ::2] = hessian
    assert not crooked.is_contiguous()
    expected, got = solver(weight, hessian), solver(crooked, padded[::2, ::2])
    assert torch.equal(got.weight, expected.weight)
    assert got.weight.is_contiguous()


@every_solver
def test_inputs_are_not_changed(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    solution = solver(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert solution.weight.data_ptr() != weight.data_ptr()


@every_solver
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_is_named(solver: Callable[..., obs.LayerSolution], value: float) -> None:
    weight, hessian = problem()
    spoiled = weight.clone()
    spoiled[1, 2] = value
    with pytest.raises(NonFiniteError, match="weight"):
        solver(spoiled, hessian)
    hessian[0, 0] = value
    with pytest.raises(NonFiniteError, match="Hessian"):
        solver(weight, hessian)


@every_solver
def test_shapes_that_do_not_fit_are_named(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    for bad_weight, bad_hessian in (
        (weight, hessian[:8, :8]),
        (weight, hessian[:8]),
        (weight, hessian.expand(3, 12, 12)),
        (weight[0], hessian),
        (weight[:0], hessian),
        (weight.int(), hessian),
    ):
        with pytest.raises(OBCError):
            solver(bad_weight, bad_hessian)


def test_masks_that_do_not_fit_are_named() -> None:
    weight, hessian = problem()
    for mask in (torch.ones(6, 11, dtype=torch.bool), torch.ones(6, 12)):
        with pytest.raises(ShapeError, match="mask"):
            obs.quantize(weight, hessian, 4, mask=mask)


@every_solver
@pytest.mark.parametrize("damping", [-1.0, float("nan"), "much"])
def test_impossible_damping(solver: Callable[..., obs.LayerSolution], damping: float) -> None:
    with pytest.raises(SpecError, match="damping"):
        solver(*problem(), damping=damping)


@every_solver
def test_automatic_damping_needs_the_halves(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    with pytest.raises(SpecError, match="two-half"):
        solver(weight, hessian, damping="auto")


@every_solver
def test_a_statistic_with_one_empty_half(solver: Callable[..., obs.LayerSolution]) -> None:
    weight, hessian = problem()
    one = Hessian(torch.stack([hessian * 24, 0 * hessian])[:, None], (48, 0))
    solution = solver(weight, one, damping="auto")
    torch.testing.assert_close(solution.weight, solver(weight, hessian).weight)
    assert solution.status.held_out is None


@pytest.mark.gpu
@every_solver
def test_hessian_on_another_device(solver: Callable[..., obs.LayerSolution]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight, hessian = problem()
    solution = solver(weight.cuda(), hessian)
    assert solution.weight.device.type == "cuda"
    assert solver(weight, hessian.cuda()).weight.device.type == "cpu"
