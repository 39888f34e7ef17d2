"""What must not change a result: the order of rows and columns, units, problems that share nothing, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_obc import baselines, obs
from lightning_obc.obs import LayerSolution
from lightning_obc.solvers import Refine
from lightning_obc.specs import Block, IntGrid, Structured, Unstructured

ROWS, COLUMNS = 6, 48
Solve = Callable[..., LayerSolution]
PRUNED: dict[str, Solve] = {
    "unstructured": lambda w, h, **o: obs.prune(w, h, Unstructured(0.6), **o),
    "hull": lambda w, h, **o: obs.prune(w, h, Unstructured(0.6), selection="hull", **o),
    "2:4": lambda w, h, **o: obs.prune(w, h, "2:4", **o),
    "blocks": lambda w, h, **o: obs.prune(w, h, Block(4, 0.5), **o),
    "structured": lambda w, h, **o: obs.prune(w, h, Structured(0.5), **o),
    "2:4 refined": lambda w, h, **o: obs.prune(w, h, "2:4", refine=Refine(), **o),
    "magnitude": lambda w, h, **o: baselines.magnitude(w, h, 0.6, **o),
    "adaprune": lambda w, h, **o: baselines.adaprune(w, h, "2:4", **o),
    "sparsegpt": lambda w, h, **o: baselines.sparsegpt(w, h, "2:4", **o),
}
CODED: dict[str, Solve] = {
    "greedy": lambda w, h, **o: obs.quantize(w, h, 3, order="greedy", **o),
    "auto": lambda w, h, **o: obs.quantize(w, h, 3, **o),
    "symmetric": lambda w, h, **o: obs.quantize(w, h, IntGrid(4, symmetric=True), **o),
    "hessian": lambda w, h, **o: obs.quantize(w, h, IntGrid(3, scale="hessian"), **o),
    "refined": lambda w, h, **o: obs.quantize(w, h, 3, refine=Refine(), **o),
    "nearest": lambda w, h, **o: baselines.round_to_nearest(w, h, 3, **o),
    "gptq-act": lambda w, h, **o: baselines.gptq(w, h, 3, act_order=True, **o),
}
SOLVERS = PRUNED | CODED
# Results that the order of the columns has no part in (refined codes: coordinate descent goes by it).
FREE_OF_ORDER: dict[str, Solve] = {name: solve for name, solve in PRUNED.items() if name != "sparsegpt"} | {
    "greedy": CODED["greedy"],
    "symmetric": lambda w, h: CODED["symmetric"](w, h, order="greedy"),
    "hessian": lambda w, h: CODED["hessian"](w, h, order="greedy"),
    "nearest": CODED["nearest"],
    "gptq-act": CODED["gptq-act"],
}
# One scale for each half of the columns.
HALVES = IntGrid(3, granularity="group", group_size=COLUMNS)
BY_ROW: dict[str, Solve] = {
    "2:4": PRUNED["2:4"],
    "sparsegpt": PRUNED["sparsegpt"],
    "adaprune": PRUNED["adaprune"],
    "greedy": lambda w, h: obs.quantize(w, h, HALVES, order="greedy"),
    "gptq-act": lambda w, h: baselines.gptq(w, h, HALVES, act_order=True),
}
every_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


def problem(seed: int = 0, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Float64 weights, so that another order of sums decides nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, columns, generator=generator).double() @ samples(columns, generator)
    return torch.randn(ROWS, columns, generator=generator).double(), 2 * x @ x.mT / x.shape[1]


def samples(columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(columns, 3 * columns, generator=generator).double().clamp(min=0)


def assert_same(got: LayerSolution, expected: LayerSolution, weight: Tensor | None = None) -> None:
    assert torch.equal(got.mask, expected.mask)
    torch.testing.assert_close(got.weight, expected.weight if weight is None else weight, rtol=1e-8, atol=1e-12)
    if expected.codes is not None:
        assert got.codes is not None
        assert torch.equal(got.codes, expected.codes)


@every_solver
def test_permuted_rows_are_the_rows_permuted(solve: Solve) -> None:
    weight, hessian = problem()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    expected, got = solve(weight, hessian), solve(weight[order], hessian)
    assert torch.equal(got.mask, expected.mask[order])
    torch.testing.assert_close(got.weight, expected.weight[order], rtol=1e-8, atol=1e-12)
    assert got.loss == pytest.approx(expected.loss, rel=1e-9)


@pytest.mark.parametrize("solve", FREE_OF_ORDER.values(), ids=FREE_OF_ORDER)
def test_permuted_columns_are_the_columns_permuted(solve: Solve) -> None:
    """Groups of four stay together; columns move within them and with them."""
    weight, hessian = problem()
    generator = torch.Generator().manual_seed(2)
    groups = torch.arange(COLUMNS).view(-1, 4)[torch.randperm(COLUMNS // 4, generator=generator)]
    order = torch.stack([group[torch.randperm(4, generator=generator)] for group in groups]).flatten()
    expected, got = solve(weight, hessian), solve(weight[:, order], hessian[order][:, order])
    assert torch.equal(got.mask, expected.mask[:, order])
    torch.testing.assert_close(got.weight, expected.weight[:, order], rtol=1e-8, atol=1e-12)
    assert got.loss == pytest.approx(expected.loss, rel=1e-9)


@every_solver
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_the_inputs_change_nothing(solve: Solve, scale: float) -> None:
    """No power of two: rounding differs, results do not."""
    weight, hessian = problem()
    expected, got = solve(weight, hessian), solve(weight, hessian * scale)
    assert_same(got, expected)
    assert got.loss == pytest.approx(expected.loss * scale, rel=1e-8)
    assert got.relative_error == pytest.approx(expected.relative_error, rel=1e-8)
    assert got.status == expected.status


@every_solver
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_of_the_weights_change_nothing_but_the_weights(solve: Solve, scale: float) -> None:
    weight, hessian = problem()
    expected, got = solve(weight, hessian), solve(weight * scale, hessian)
    assert_same(got, expected, expected.weight * scale)
    assert got.relative_error == pytest.approx(expected.relative_error, rel=1e-8)
    assert got.status == expected.status


@every_solver
def test_float32_agrees_over_units_and_rows(solve: Solve) -> None:
    """Powers of two change no digit, whatever the precision."""
    weight, hessian = problem()
    weight = weight.float()
    expected, got = solve(weight, hessian), solve(weight * 2.0**20, hessian * 2.0**-40)
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.weight, expected.weight * 2.0**20)
    assert got.loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("solve", BY_ROW.values(), ids=BY_ROW)
def test_inputs_that_share_nothing_are_problems_of_their_own(solve: Solve) -> None:
    """A block-diagonal Hessian splits where each row is solved by itself."""
    first, (other, hessian) = problem(3), problem(4)
    # Damping is a share of the mean over all columns.
    second = (other, hessian * (first[1].diagonal().mean() / hessian.diagonal().mean()))
    both = solve(torch.cat([first[0], second[0]], 1), torch.block_diag(first[1], second[1]))
    alone = [solve(*part) for part in (first, second)]
    assert torch.equal(both.mask, torch.cat([part.mask for part in alone], 1))
    torch.testing.assert_close(both.weight, torch.cat([part.weight for part in alone], 1), rtol=1e-8, atol=1e-12)
    assert both.loss == pytest.approx(sum(part.loss for part in alone), rel=1e-8)


BUDGETED = {
    name: solve for name, solve in SOLVERS.items() if name in ("unstructured", "2:4", "blocks", "greedy", "auto")
}


@pytest.mark.parametrize("solve", BUDGETED.values(), ids=BUDGETED)
@pytest.mark.parametrize("backend", ["naive", "torch", "numba"])
def test_memory_and_threads_change_nothing(solve: Solve, backend: str) -> None:
    weight, hessian = problem()
    expected = solve(weight, hessian, backend=backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again, small = (solve(weight, hessian, backend=backend, **o) for o in ({}, {"memory_budget": 1}))
    finally:
        torch.set_num_threads(threads)
    assert_same(again, expected)
    assert_same(small, expected)


def test_a_column_that_appears_twice_can_carry_its_twin() -> None:
    """Two equal inputs are one with the sum of the weights: pruning one of each pair costs nothing but damping."""
    weight, hessian = problem()
    twice = hessian.repeat(2, 2)
    pruned = obs.prune(torch.cat([weight, weight], 1), twice, Unstructured(0.5), damping=1e-7)
    assert pruned.relative_error < 1e-5
