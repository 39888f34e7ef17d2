"""Other solvers against oracles written from their papers, in float64, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_obc.baselines import adaprune, gptq, magnitude, round_to_nearest, sparsegpt
from lightning_obc.errors import PatternError, ShapeError, SpecError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.hessian import Hessian
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, IntGrid, Structured, Unstructured

PRUNERS = {"magnitude": magnitude, "sparsegpt": sparsegpt, "adaprune": adaprune}
QUANTIZERS = {"gptq": gptq, "rtn": round_to_nearest}
GRIDS = [IntGrid(4), IntGrid(2, granularity="group", group_size=4), IntGrid(3, scale="hessian")]


def problem(groups: int, rows: int, columns: int, seed: int = 0, samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(groups, columns, samples * columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    return weight, 2 * x @ x.mT / (samples * columns)


def damped(hessian: Tensor, damping: float) -> Tensor:
    bar = damping * hessian.diagonal(dim1=1, dim2=2).mean(1)
    return hessian + bar[:, None, None] * torch.eye(hessian.shape[-1], dtype=hessian.dtype)


def loss_of(solution: LayerSolution, weight: Tensor, hessian: Tensor) -> float:
    delta = (solution.weight.double() - weight.double()).reshape(hessian.shape[0], -1, hessian.shape[-1])
    return float(torch.einsum("grd,gde,gre->", delta, hessian, delta) / 2)


def fixed_order_obs(
    row: Tensor, hessian: Tensor, order: list[int], target: Callable[[int, Tensor], Tensor | float]
) -> Tensor:
    """OBS with a given order, by inverting what is left of ``H`` before every step."""
    row, left = row.clone(), list(order)
    for column in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = left.index(column)
        change = (target(column, row[column]) - row[column]) / inverse[here, here]
        row[left] += inverse[here] * change
        row[column] = target(column, row[column])
        left.remove(column)
    return row


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 5, 13), (3, 2, 8), (1, 1, 1)])
def test_gptq_is_obs_in_column_order(groups: int, rows: int, columns: int, block: int, act_order: bool) -> None:
    weight, hessian = problem(groups, rows, columns)
    solution = gptq(weight, hessian, 3, damping=0.05, act_order=act_order, block=block)
    grid = fit_grid(weight, IntGrid(3))
    expected = torch.empty_like(weight)
    for g in range(groups):
        diagonal = hessian[g].diagonal()
        order = torch.argsort(diagonal, descending=True).tolist() if act_order else list(range(columns))
        for r in range(rows):

            def nearest(column: int, value: Tensor, g: int = g, r: int = r) -> Tensor:
                whole = torch.zeros_like(weight)
                whole[g, r, column] = value
                return grid.quantize(whole)[g, r, column]

            expected[g, r] = fixed_order_obs(weight[g, r], damped(hessian, 0.05)[g], order, nearest)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-9, atol=1e-12)
    assert solution.loss == pytest.approx(loss_of(solution, weight, hessian), rel=1e-9)
    assert solution.codes is not None
    assert solution.grid is not None
    assert torch.equal(solution.grid.dequantize(solution.codes), solution.weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_sparsegpt_unstructured_is_obs_in_column_order_on_its_mask(act_order: bool) -> None:
    weight, hessian = problem(1, 6, 12)
    solution = sparsegpt(weight[0], hessian, 0.5, damping=0.05, act_order=act_order, block=12)
    assert int((~solution.mask).sum()) == 36
    order = list(range(12))
    if act_order:
        order = torch.argsort(hessian[0].diagonal(), descending=True).tolist()
    for r in range(6):

        def target(column: int, value: Tensor, r: int = r) -> Tensor | float:
            return value if bool(solution.mask[r, column]) else 0.0

        expected = fixed_order_obs(weight[0, r], damped(hessian, 0.05)[0], order, target)
        torch.testing.assert_close(solution.weight[r], expected, rtol=1e-9, atol=1e-12)


def test_sparsegpt_chooses_the_smallest_saliencies_of_each_block() -> None:
    weight, hessian = problem(1, 6, 12)
    solution = sparsegpt(weight[0], hessian, 0.5, damping=0.05, block=12)
    left = [torch.linalg.inv(damped(hessian, 0.05)[0, j:, j:])[0, 0] for j in range(12)]
    saliency = weight[0].square() / torch.stack(left)
    threshold = saliency.flatten().sort().values[35]
    assert torch.equal(~solution.mask, saliency <= threshold)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [4, 6, 128])
def test_sparsegpt_group_masks_follow_the_updated_weights(block: int, act_order: bool) -> None:
    weight, hessian = problem(1, 4, 12)
    solution = sparsegpt(weight[0], hessian, "2:4", damping=0.05, block=block, act_order=act_order)
    full = damped(hessian, 0.05)[0]
    starts = [0, 4, 8]
    if act_order:
        starts.sort(key=lambda start: -hessian[0].diagonal()[start : start + 4].mean())
    order = [start + i for start in starts for i in range(4)]
    for r in range(4):
        row, keep = weight[0, r].clone(), torch.ones(12, dtype=torch.bool)
        for position, column in enumerate(order):
            left = order[position:]
            if position % 4 == 0:
                members = order[position : position + 4]
                factors = [torch.linalg.inv(full[order[k:]][:, order[k:]])[0, 0] for k in range(position, position + 4)]
                saliency = row[members].square() / torch.stack(factors)
                keep[[members[i] for i in saliency.argsort()[:2].tolist()]] = False
            if not keep[column]:
                inverse = torch.linalg.inv(full[left][:, left])
                row[left] -= inverse[0] * (row[column] / inverse[0, 0])
                row[column] = 0
        assert torch.equal(solution.mask[r], keep)
        torch.testing.assert_close(solution.weight[r], row, rtol=1e-9, atol=1e-12)


def test_sparsegpt_joint_rounds_what_it_keeps() -> None:
    weight, hessian = problem(1, 4, 12)
    solution = sparsegpt(weight[0], hessian, "2:4", grid=4, damping=0.05)
    grid = fit_grid(weight, IntGrid(4))
    for r in range(4):

        def target(column: int, value: Tensor, r: int = r) -> Tensor | float:
            if not solution.mask[r, column]:
                return 0.0
            whole = torch.zeros_like(weight)
            whole[0, r, column] = value
            return grid.quantize(whole)[0, r, column]

        expected = fixed_order_obs(weight[0, r], damped(hessian, 0.05)[0], list(range(12)), target)
        torch.testing.assert_close(solution.weight[r], expected, rtol=1e-9, atol=1e-12)
    assert not bool(solution.mask.reshape(4, 3, 4).sum(-1).gt(2).any())


def test_adaprune_is_least_squares_on_the_magnitude_mask() -> None:
    weight, hessian = problem(2, 5, 9)
    plain, refitted = magnitude(weight, hessian, 0.4), adaprune(weight, hessian, 0.4, damping=0.02)
    assert torch.equal(plain.mask, refitted.mask)
    full = damped(hessian, 0.02)
    for g in range(2):
        for r in range(5):
            kept = plain.mask[g, r].nonzero().flatten()
            expected = torch.linalg.solve(full[g][kept][:, kept], (full[g] @ weight[g, r])[kept])
            torch.testing.assert_close(refitted.weight[g, r, kept], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(1, 4), Block(2, 0.5), Structured(0.5)])
def test_adaprune_in_steps_reaches_the_pattern(pattern: Unstructured) -> None:
    weight, hessian = problem(1, 6, 16)
    once, thrice = (adaprune(weight[0], hessian, pattern, steps=n, channels=8) for n in (1, 3))
    assert int(once.mask.sum()) == int(thrice.mask.sum())
    assert not torch.equal(once.mask, thrice.mask)


def test_magnitude_masks() -> None:
    weight = torch.tensor([[0.1, -4.0, 3.0, 0.2, 5.0, 6.0, -0.3, 7.0]])
    eye = torch.eye(8)
    assert magnitude(weight, eye, 0.5).mask.int().tolist() == [[0, 1, 0, 0, 1, 1, 0, 1]]
    assert magnitude(weight, eye, "2:4").mask.int().tolist() == [[0, 1, 1, 0, 0, 1, 0, 1]]
    assert magnitude(weight, eye, Block(2, 0.5)).mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    # Two kernel positions of four channels: channel 2 holds 3.0 and -0.3, channel 0 holds 0.1 and 5.0.
    assert magnitude(weight, eye, Structured(0.25), channels=4).mask.int().tolist() == [[1, 1, 0, 1, 1, 1, 0, 1]]
    short = magnitude(weight[:, :6], torch.eye(6), "2:4", misfit="pad")
    assert short.mask.int().tolist() == [[0, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), Block(4, 0.5)])
def test_existing_zeros_count_and_stay(name: str, pattern: Unstructured) -> None:
    weight, hessian = problem(1, 8, 24)
    weight = weight[0].float()
    weight[:, 4:12] = 0.0
    weight[3, 20:] = 0.0
    solution = PRUNERS[name](weight, hessian, pattern, channels=12)
    assert torch.equal(solution.weight[weight == 0], torch.zeros(int((weight == 0).sum())))
    assert not torch.signbit(solution.weight[solution.weight == 0]).any()
    assert not bool((solution.weight[~solution.mask] != 0).any())
    if isinstance(pattern, NM):
        assert int(solution.mask.reshape(-1, 4).sum(1).max()) <= 2
    else:
        assert int((~solution.mask).sum()) == 8 * 12


@pytest.mark.parametrize("block", [5, 16, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.777])
def test_sparsegpt_reaches_the_exact_number_of_zeros(sparsity: float, block: int) -> None:
    weight, hessian = problem(3, 5, 17)
    weight[1, :, 3:9] = 0.0
    solution = sparsegpt(weight, hessian, sparsity, block=block)
    wanted = max(-(-round(sparsity * weight.numel(), 6) // 1), 30)
    assert int((~solution.mask).sum()) == wanted


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(
    "spec", [IntGrid(4), IntGrid(2, granularity="group", group_size=4), IntGrid(3, scale="hessian")]
)
def test_masked_weights_are_positive_zeros(name: str, spec: IntGrid) -> None:
    weight, hessian = problem(2, 4, 8)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    solution = QUANTIZERS[name](weight, hessian, spec, mask=mask)
    gone = solution.weight[~mask]
    assert torch.equal(gone, torch.zeros_like(gone))
    assert not torch.signbit(gone).any()
    assert solution.grid is not None
    assert solution.codes is not None
    assert torch.equal(solution.grid.dequantize(solution.codes), solution.weight)


def test_hessian_refit_of_the_scale_is_never_worse() -> None:
    for seed in range(5):
        weight, hessian = problem(1, 6, 20, seed)
        solution = round_to_nearest(weight, hessian, IntGrid(3, scale="hessian"))
        assert solution.codes is not None
        full = damped(hessian, 0.01)
        unrefitted = fit_grid(weight, IntGrid(3, scale="hessian"), hessian=full).dequantize(solution.codes)
        assert loss_of(solution, weight, full) <= loss_of_weight(unrefitted, weight, full) * (1 + 1e-12)


def loss_of_weight(candidate: Tensor, weight: Tensor, hessian: Tensor) -> float:
    return float(torch.einsum("grd,gde,gre->", candidate - weight, hessian, candidate - weight) / 2)


@pytest.mark.parametrize("solver", [*PRUNERS, *QUANTIZERS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shape_dtype_and_inputs_are_left_alone(solver: str, dtype: torch.dtype) -> None:
    weight, hessian = problem(1, 4, 8)
    weight = weight[0].to(dtype)
    before = weight.clone(), hessian.clone()
    solve: Callable[..., LayerSolution] = (PRUNERS | QUANTIZERS)[solver]
    level = 4 if solver in QUANTIZERS else 0.5
    solution = solve(weight, hessian, level)
    assert solution.weight.shape == solution.mask.shape == (4, 8)
    assert solution.weight.dtype == dtype
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    again = solve(weight, hessian, level)
    assert torch.equal(solution.weight, again.weight)
    assert solution.loss == pytest.approx(loss_of(solution, weight, hessian), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("solver", [*PRUNERS, *QUANTIZERS])
def test_damping_by_two_halves(solver: str) -> None:
    weight, hessian = problem(1, 40, 12)
    other = problem(1, 40, 12, seed=1)[1]
    halves = Hessian(torch.stack([hessian, other]) * 24, (48, 48))
    solve: Callable[..., LayerSolution] = (PRUNERS | QUANTIZERS)[solver]
    mask = {"mask": weight[0] > -1} if solver in QUANTIZERS else {}
    solution = solve(weight[0], halves, 3 if solver in QUANTIZERS else 0.5, damping="auto", **mask)
    assert solution.status.held_out is not None
    assert 0 < solution.status.held_out < 1


def test_named_errors() -> None:
    weight, hessian = problem(1, 4, 10)
    with pytest.raises(PatternError, match="multiple of 4"):
        sparsegpt(weight, hessian, "2:4")
    with pytest.raises(PatternError, match="multiple of 4"):
        magnitude(weight, hessian, Block(4, 0.5))
    with pytest.raises(SpecError, match="SparseGPT"):
        sparsegpt(weight, hessian, Structured(0.5))
    with pytest.raises(SpecError, match="steps"):
        adaprune(weight, hessian, 0.5, steps=0)
    with pytest.raises(ShapeError, match="mask"):
        gptq(weight, hessian, 4, mask=torch.ones(4, 10, dtype=torch.bool))
