"""Bad input: the right answer or a named error, for every pattern, every kind of grid and every solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_obc import baselines, obs
from lightning_obc.errors import (
    AsymmetricHessianError,
    NonFiniteError,
    NotPositiveDefiniteError,
    OBCError,
    PatternError,
    ShapeError,
    SpecError,
)
from lightning_obc.hessian import Hessian
from lightning_obc.specs import Block, IntGrid, Pattern, Structured

Solver = Callable[..., obs.LayerSolution]


def pruning(pattern: Pattern | str | float, solver: Solver = obs.prune, **fixed: Any) -> Solver:
    return lambda weight, hessian, **options: solver(weight, hessian, pattern, **fixed, **options)


def codes(grid: IntGrid | int, solver: Solver = obs.quantize, **fixed: Any) -> Solver:
    return lambda weight, hessian, **options: solver(weight, hessian, grid, **fixed, **options)


def joint(weight: Tensor, hessian: Tensor, **options: Any) -> obs.LayerSolution:
    """Codes on a mask that is still to be made: every second column goes, but of the first row."""
    mask = torch.ones(weight.shape, dtype=torch.bool)
    mask[..., 1::2] = False
    mask[:1] = True
    return obs.quantize(weight, hessian, 4, mask=mask, **options)


SOLVERS: dict[str, Solver] = {
    "half": pruning(0.5),
    "half refined": pruning(0.5, refine=True),
    "2:4": pruning("2:4"),
    "2:4 refined": pruning("2:4", refine=True),
    "1:4": pruning("1:4"),
    "blocks": pruning(Block(4, 0.5)),
    "structured": pruning(Structured(0.5)),
    "int4": codes(4),
    "int2 refined": codes(2, refine=True),
    "int3 symmetric": codes(IntGrid(3, symmetric=True)),
    "int3 per tensor": codes(IntGrid(3, granularity="tensor")),
    "int3 per group": codes(IntGrid(3, granularity="group", group_size=4)),
    "int3 hessian": codes(IntGrid(3, scale="hessian")),
    "int4 min-max": codes(IntGrid(4, scale="minmax")),
    "joint": joint,
    "magnitude": pruning(0.5, baselines.magnitude),
    "sparsegpt": pruning("2:4", baselines.sparsegpt),
    "sparsegpt-act": pruning(0.5, baselines.sparsegpt, act_order=True),
    "adaprune": pruning(0.5, baselines.adaprune),
    "rtn": codes(4, baselines.round_to_nearest),
    "gptq": codes(4, baselines.gptq),
    "gptq-act": codes(4, baselines.gptq, act_order=True),
}
# One column is no group of four.
NEED_FOUR = {"2:4", "2:4 refined", "1:4", "blocks", "int3 per group", "sparsegpt"}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
ONE_BIT = [
    *(IntGrid(1, scale=scale) for scale in ("mse", "minmax", "hessian")),
    IntGrid(1, granularity="tensor"),
    IntGrid(1, granularity="group", group_size=4),
]


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
def test_indefinite_hessians_are_named(solver: Solver) -> None:
    weight, hessian = problem()
    hessian -= 2 * torch.eye(12, dtype=torch.float64) * hessian.diagonal().max()
    with pytest.raises(NotPositiveDefiniteError, match="Remedy: raise damping"):
        solver(weight, hessian)


@every_solver
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01])
def test_fewer_samples_than_columns(solver: Solver, damping: float) -> None:
    weight, hessian = problem(samples=5)
    solution = solver(weight, hessian, damping=damping)
    sane(solution, weight, hessian)
    if damping == 0:
        assert solution.status.damping > 0
        assert "Cholesky failed" in str(solution.status)


@every_solver
def test_constant_and_repeated_columns(solver: Solver) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 48, generator=generator, dtype=torch.float64)
    x[3], x[4] = 5.0, 5.0
    x[7] = x[6]
    weight, hessian = torch.randn(6, 12, generator=generator), 2 * x @ x.T / 48
    sane(solver(weight, hessian), weight, hessian)


@every_solver
def test_dead_columns_are_counted_and_cost_nothing(solver: Solver) -> None:
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
def test_all_inputs_zero(solver: Solver) -> None:
    weight, hessian = problem()
    solution = solver(weight, 0 * hessian)
    assert solution.loss == 0
    assert solution.relative_error == 0
    assert bool(torch.isfinite(solution.weight).all())


@every_solver
def test_a_row_of_zeros_stays_zero(solver: Solver) -> None:
    weight, hessian = problem()
    weight[2] = 0.0
    solution = solver(weight, hessian)
    sane(solution, weight, hessian)
    assert torch.equal(solution.weight[2], torch.zeros(12))
    assert not torch.signbit(solution.weight[2]).any()


@every_solver
def test_all_weights_zero(solver: Solver) -> None:
    weight, hessian = problem()
    solution = solver(0 * weight, hessian)
    assert torch.equal(solution.weight, torch.zeros_like(weight))
    assert solution.loss == 0


@pytest.mark.parametrize("spec", ONE_BIT, ids=lambda spec: f"{spec.granularity} {spec.scale}")
@pytest.mark.parametrize(
    "options",
    [{}, {"refine": True}, {"solver": baselines.gptq}, {"solver": baselines.round_to_nearest}],
    ids=["obs", "refined", "gptq", "rtn"],
)
def test_one_bit(options: dict[str, Any], spec: IntGrid) -> None:
    weight, hessian = problem()
    solution = codes(spec, **options)(weight, hessian)
    sane(solution, weight, hessian)
    runs = solution.weight.reshape(6, -1, spec.group_size or 12)
    assert max(len(run.unique()) for run in runs.flatten(0, 1)) <= 2
    if spec.granularity == "tensor":
        assert len(solution.weight.unique()) <= 2


def test_one_bit_has_no_symmetric_grid() -> None:
    with pytest.raises(SpecError, match="too few bits"):
        IntGrid(1, symmetric=True)


@pytest.mark.parametrize("bits", [0, 9, 2.5, True])
def test_impossible_bits(bits: float) -> None:
    with pytest.raises(SpecError, match="bit width"):
        obs.quantize(*problem(), bits)  # type: ignore[arg-type]


@every_solver
@pytest.mark.parametrize(("rows", "columns"), [(1, 12), (5, 4), (1, 4)])
def test_one_row(solver: Solver, rows: int, columns: int) -> None:
    weight, hessian = problem(rows, columns)
    sane(solver(weight, hessian), weight, hessian)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", SOLVERS)
def test_one_column(rows: int, name: str) -> None:
    weight, hessian = problem(rows, 1)
    if name in NEED_FOUR:
        with pytest.raises(PatternError, match=r"multiple of 4|group"):
            SOLVERS[name](weight, hessian)
        return
    solution = SOLVERS[name](weight, hessian)
    sane(solution, weight, hessian)
    if name in ("half", "half refined", "adaprune", "magnitude"):
        assert int((~solution.mask).sum()) == -(-rows // 2)
        smallest = weight.abs().flatten().argsort()[: -(-rows // 2)]
        assert not bool(solution.mask.flatten()[smallest].any())
    if name == "structured":
        assert not bool(solution.mask.any())


@every_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(solver: Solver, dtype: torch.dtype) -> None:
    weight, hessian = problem()
    narrow = weight.to(dtype)
    solution = solver(narrow, hessian)
    sane(solution, narrow, hessian)
    wide = solver(narrow.float(), hessian)
    assert torch.equal(solution.mask, wide.mask)
    torch.testing.assert_close(solution.weight, wide.weight.to(dtype))


@every_solver
def test_non_contiguous_tensors(solver: Solver) -> None:
    weight, hessian = problem()
    crooked = weight.T.contiguous().T
    padded = torch.zeros(24, 24, dtype=torch.float64)
    padded[::2, ::2] = hessian
    assert not crooked.is_contiguous()
    expected, got = solver(weight, hessian), solver(crooked, padded[::2, ::2])
    assert torch.equal(got.weight, expected.weight)
    assert got.weight.is_contiguous()
    assert got.mask.is_contiguous()


@every_solver
def test_inputs_are_not_changed(solver: Solver) -> None:
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    solution = solver(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert solution.weight.data_ptr() != weight.data_ptr()


@every_solver
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_is_named(solver: Solver, value: float) -> None:
    weight, hessian = problem()
    spoiled = weight.clone()
    spoiled[1, 2] = value
    with pytest.raises(NonFiniteError, match="weight"):
        solver(spoiled, hessian)
    hessian[0, 0] = value
    with pytest.raises(NonFiniteError, match="Hessian"):
        solver(weight, hessian)


@every_solver
def test_shapes_that_do_not_fit_are_named(solver: Solver) -> None:
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
    flags = torch.ones(6, 12, dtype=torch.bool)
    for mask in (flags[:, :11], flags.float(), flags.to("meta")):
        with pytest.raises(ShapeError, match="mask"):
            obs.quantize(weight, hessian, 4, mask=mask)


@every_solver
@pytest.mark.parametrize("damping", [-1.0, float("nan"), "much"])
def test_impossible_damping(solver: Solver, damping: float) -> None:
    with pytest.raises(SpecError, match="damping"):
        solver(*problem(), damping=damping)


@every_solver
def test_automatic_damping_needs_the_halves(solver: Solver) -> None:
    weight, hessian = problem()
    with pytest.raises(SpecError, match="two-half"):
        solver(weight, hessian, damping="auto")


@every_solver
def test_a_statistic_with_one_empty_half(solver: Solver) -> None:
    weight, hessian = problem()
    one = Hessian(torch.stack([hessian * 24, 0 * hessian])[:, None], (48, 0))
    solution = solver(weight, one, damping="auto")
    torch.testing.assert_close(solution.weight, solver(weight, hessian).weight)
    assert solution.status.held_out is None


@every_solver
@pytest.mark.parametrize("damping", [0.01, "auto"])
def test_tensors_without_data_are_named(solver: Solver, damping: float | str) -> None:
    weight, hessian = problem()
    halves = Hessian(torch.stack([hessian * 24, hessian * 24])[:, None], (24, 24))
    for bad_weight, bad_hessian in ((weight.to("meta"), halves), (weight, halves.to("meta"))):
        with pytest.raises(ShapeError, match=r"has no data.*meta device"):
            solver(bad_weight, bad_hessian, damping=damping)


@every_solver
def test_a_hessian_with_one_triangle_is_named(solver: Solver) -> None:
    weight, hessian = problem()
    with pytest.raises(AsymmetricHessianError, match=r"H\[\d+, \d+\].*both triangles filled.*Remedy"):
        solver(weight, torch.tril(hessian))


@every_solver
def test_triangles_in_half_precision_are_evened_out(solver: Solver) -> None:
    weight, hessian = problem()
    uneven = hessian.bfloat16().double()
    uneven += torch.triu(2**-8 * uneven, 1)
    even = (uneven + uneven.T) / 2
    assert torch.equal(solver(weight, uneven).weight, solver(weight, even).weight)


@every_solver
def test_a_hessian_in_float32_is_used_in_float64(solver: Solver) -> None:
    weight, hessian = problem()
    single = hessian.float()
    assert torch.equal(solver(weight, single).weight, solver(weight, single.double()).weight)


@pytest.mark.gpu
@every_solver
def test_hessian_on_another_device(solver: Solver) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight, hessian = problem()
    solution = solver(weight.cuda(), hessian)
    assert solution.weight.device.type == "cuda"
    assert solver(weight, hessian.cuda()).weight.device.type == "cpu"
