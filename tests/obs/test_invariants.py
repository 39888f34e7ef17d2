"""Invariants of the engine on random problems: it reports what it returns, and stages do not undo each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import BackendError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.prune import nm_groups
from lightning_obc.solvers import Refine
from lightning_obc.specs import NM, IntGrid, Unstructured

quick = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """A layer problem; ``str`` shows what made it."""

    weight: Tensor
    hessian: Tensor
    damping: float
    backend: str
    seed: int

    def __repr__(self) -> str:
        return (
            f"Case({tuple(self.weight.shape)}, {self.weight.dtype}, {self.damping}, {self.backend}, seed={self.seed})"
        )


def available(names: tuple[str, ...] = ("naive", "torch", "numba")) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(obs_sweep.resolve_backend(name, "cpu"))
        except BackendError:
            continue
    return found


@st.composite
def cases(draw: st.DrawFn, multiple: int = 1) -> Case:
    groups, rows = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    columns = multiple * draw(st.integers(1, 24 // multiple))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    samples = draw(st.integers(max(1, columns // 2), 4 * columns))
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(groups, columns, samples, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        weight[torch.rand(weight.shape, generator=generator) < 0.2] = 0.0
    weight = weight.to(draw(st.sampled_from([torch.float32, torch.float64])))
    damping = draw(st.sampled_from([1e-3, 1e-2, 0.1]))
    return Case(weight, 2 * x @ x.mT / samples, damping, draw(st.sampled_from(available())), seed)


def damped(case: Case, solution: obs.LayerSolution | None = None) -> Tensor:
    share = case.damping if solution is None else solution.status.damping
    bar = share * case.hessian.diagonal(dim1=1, dim2=2).mean(1)
    return case.hessian + bar[:, None, None] * torch.eye(case.hessian.shape[-1], dtype=torch.float64)


def quadratic(delta: Tensor, hessian: Tensor) -> float:
    return float(torch.einsum("grd,gde,gre->", delta, hessian, delta) / 2)


def scale_of(case: Case) -> float:
    return quadratic(case.weight.double(), damped(case))


@quick
@given(cases())
def test_sweep_losses_add_up_to_the_damped_loss(case: Case) -> None:
    """Σ loss of a full sweep is ½ tr(W (H + λ̄I) Wᵀ): everything goes to zero."""
    sweep = obs.sweep(case.weight, case.hessian, damping=case.damping, backend=case.backend)
    total = float(sweep.losses.double().sum())
    assert total == pytest.approx(quadratic(case.weight.double(), sweep.problem.damped), rel=1e-4, abs=1e-12)


@quick
@given(cases(), st.floats(0.0, 0.99))
def test_losses_up_to_a_level_are_the_loss_of_that_level(case: Case, sparsity: float) -> None:
    sweep = obs.sweep(case.weight, case.hessian, damping=case.damping, backend=case.backend)
    solution = sweep.solution(sparsity)
    gone = torch.zeros(solution.mask.shape, dtype=torch.bool)
    steps = torch.arange(case.weight.shape[-1])
    gone.scatter_(-1, sweep.order.long(), steps < (~solution.mask).sum(-1, keepdim=True))
    assert torch.equal(gone, ~solution.mask)
    counted = (steps < (~solution.mask).sum(-1, keepdim=True)) * sweep.losses.double()
    expected = solution.loss + solution.damping_loss
    assert float(counted.sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4 * scale_of(case))


@quick
@given(cases(multiple=4))
def test_sweep_losses_of_groups_add_up(case: Case) -> None:
    problem = obs.prepare(case.weight, case.hessian, case.damping)
    pattern = NM(2, 4)
    groups = nm_groups(case.weight.shape[-1], case.weight.shape[-1], pattern, case.weight.device)
    keep = case.weight != 0
    output = obs_sweep.sweep_prune(problem.sweep_input(keep), groups=groups, backend=case.backend)
    solution = obs.prune(case.weight, case.hessian, pattern, damping=case.damping, backend=case.backend)
    expected = solution.loss + solution.damping_loss
    assert float(output.losses.double().sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6 * scale_of(case))


@quick
@given(cases(), st.integers(1, 8))
def test_sweep_losses_of_codes_add_up(case: Case, bits: int) -> None:
    problem = obs.prepare(case.weight, case.hessian, case.damping)
    spec = IntGrid(bits)
    grid = fit_grid(problem.weight, spec)
    columns = case.weight.shape[-1]
    table = obs_sweep.GridInput(
        *(grid.expand(part, columns).contiguous() for part in (grid.scale, grid.zero_point)), grid.max_code
    )
    output = obs_sweep.sweep_quantize(problem.sweep_input(), table, backend=case.backend)
    solution = solve(case, spec, order="greedy")
    expected = solution.loss + solution.damping_loss
    assert float(output.losses.double().sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale_of(case))


@quick
@given(cases(multiple=4), st.sampled_from([0.5, "2:4", 4, 2, IntGrid(3, scale="hessian")]), st.booleans())
def test_reported_losses_are_those_of_the_weights(case: Case, what: object, refine: bool) -> None:
    solution = solve(case, what, refine=refine)
    delta = solution.weight.double() - case.weight.double()
    assert solution.loss == pytest.approx(quadratic(delta, case.hessian), rel=1e-9, abs=1e-12)
    rest = quadratic(delta, damped(case, solution)) - quadratic(delta, case.hessian)
    assert solution.damping_loss == pytest.approx(rest, rel=1e-5, abs=1e-9 * (1 + scale_of(case)))
    assert solution.reference == pytest.approx(quadratic(case.weight.double(), case.hessian), rel=1e-9)
    assert not bool((solution.weight[~solution.mask] != 0).any())
    assert not torch.signbit(solution.weight[solution.weight == 0]).any()
    if solution.grid is not None and solution.codes is not None:
        assert torch.equal(solution.grid.dequantize(solution.codes), solution.weight)


def solve(case: Case, what: object, **options: object) -> obs.LayerSolution:
    keywords = {"damping": case.damping, "backend": case.backend, **options}
    if isinstance(what, (int, IntGrid)):
        return obs.quantize(case.weight, case.hessian, what, **keywords)  # type: ignore[arg-type]
    return obs.prune(case.weight, case.hessian, what, **keywords)  # type: ignore[arg-type]


@quick
@given(cases(multiple=4), st.sampled_from([0.3, 0.8, "1:4", "2:4", 4, 2, IntGrid(3, granularity="tensor")]))
def test_refined_is_never_worse(case: Case, what: object) -> None:
    greedy, refined = solve(case, what), solve(case, what, refine=Refine(sweeps=5, swaps=8))
    before, after = (solution.loss + solution.damping_loss for solution in (greedy, refined))
    assert after <= before * (1 + 1e-9)
    assert int(refined.mask.sum()) == int(greedy.mask.sum())
    if isinstance(what, str):
        kept = NM(int(what[0]), 4).n
        assert int(refined.mask.reshape(*refined.mask.shape[:-1], -1, 4).sum(-1).max()) <= kept


@quick
@given(cases(), st.floats(0, 0.95), st.floats(0, 0.95), st.booleans())
def test_masks_grow_from_stage_to_stage(case: Case, one: float, two: float, refine: bool) -> None:
    mild, strong = sorted((one, two))
    first = solve(case, Unstructured(mild), refine=refine)
    again = Case(first.weight, case.hessian, case.damping, case.backend, case.seed)
    second = solve(again, Unstructured(strong), refine=refine)
    assert not bool((second.mask & ~first.mask).any())
    assert not bool((second.weight[~first.mask] != 0).any())
    assert not bool((second.weight[case.weight == 0] != 0).any())


@quick
@given(cases(multiple=4), st.sampled_from([1, 2, 4, IntGrid(3, granularity="group", group_size=4)]), st.booleans())
def test_zeros_survive_quantization(case: Case, grid: int, refine: bool) -> None:
    pruned = solve(case, "2:4")
    later = Case(pruned.weight, case.hessian, case.damping, case.backend, case.seed)
    solution = solve(later, grid, mask=pruned.mask, refine=refine)
    zeros = solution.weight[~pruned.mask]
    assert torch.equal(zeros, torch.zeros_like(zeros))
    assert not torch.signbit(zeros).any()
    assert torch.equal(solution.mask, pruned.mask)


@quick
@given(cases(multiple=4), st.sampled_from([0.6, "2:4", 3]), st.booleans())
def test_the_same_inputs_give_the_same_bits(case: Case, what: object, refine: bool) -> None:
    first, second = (solve(case, what, refine=refine) for _ in range(2))
    assert torch.equal(first.weight.view(torch.uint8), second.weight.view(torch.uint8))
    assert torch.equal(first.mask, second.mask)
    assert (first.loss, first.damping_loss) == (second.loss, second.damping_loss)


@quick
@given(cases(), st.floats(0, 0.9), st.floats(0, 0.9))
def test_levels_of_one_sweep_are_nested(case: Case, one: float, two: float) -> None:
    sweep = obs.sweep(case.weight, case.hessian, damping=case.damping, backend=case.backend)
    mild, strong = (sweep.mask(level, "hull") for level in sorted((one, two)))
    assert not bool((strong & ~mild).any())
