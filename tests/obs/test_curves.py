"""Loss curves against the losses of the solutions that they lead to."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_obc import baselines, obs
from lightning_obc.obs.curves import heap_curve, line, step_curve
from lightning_obc.obs.parts import solution_from_parts, solution_parts
from lightning_obc.solvers import Order
from lightning_obc.specs import NM, Block, IntGrid, Structured, Unstructured


def layer(groups: int = 2, rows: int = 6, columns: int = 24, zeros: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(groups, 200, columns, generator=generator, dtype=torch.float64)
    x = x + x.roll(1, -1)
    weight = torch.randn(groups, rows, columns, generator=generator)
    if zeros:
        weight[..., ::5] = 0
        weight[0, 0, :7] = 0
    return weight, x.mT @ x / 100


def whole(weight: Tensor, hessian: Tensor, damping: float = 0.01) -> float:
    """``½ w (H + λ̄I) wᵀ``, written out."""
    size = weight.shape[-1]
    share = damping * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = hessian + share[:, None, None] * torch.eye(size, dtype=hessian.dtype)
    return float(torch.einsum("gri,gij,grj->", weight.double(), damped, weight.double()) / 2)


def is_a_curve(curve: tuple[tuple[float, float], ...], most: int = 33) -> bool:
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(curve))
    return 2 <= len(curve) <= most and rising and 0 < curve[0][0] <= curve[-1][0] <= 1


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("backend", ["numba", "torch", "naive"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8)], ids=str)
def test_a_curve_of_pruning_ends_at_the_loss_of_the_solution(pattern: NM, backend: str, zeros: bool) -> None:
    weight, hessian = layer(zeros=zeros)
    found = obs.prune(weight, hessian, pattern, backend=backend)
    assert is_a_curve(found.curve)
    # An exact elimination ends at the optimal weights of its mask, so that its steps add up to their damped loss.
    total = (found.loss + found.damping_loss) / whole(weight, hessian)
    assert found.curve[-1] == (pytest.approx(found.sparsity), pytest.approx(total, rel=1e-4))


@pytest.mark.parametrize("zeros", [False, True])
def test_a_curve_of_structured_pruning_ends_at_the_loss_of_the_solution(zeros: bool) -> None:
    weight, hessian = layer(zeros=zeros)
    found = obs.prune(weight, hessian, Structured(0.5))
    total = (found.loss + found.damping_loss) / whole(weight, hessian)
    assert is_a_curve(found.curve)
    share, loss = found.curve[-1]
    assert share == pytest.approx(0.5)
    # While channels leave, weights that were zero already may move; the solution holds them at zero, which costs more.
    assert loss < total if zeros else loss == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Block(4, 0.5)], ids=str)
def test_a_curve_of_all_levels_passes_through_that_of_the_solution(pattern: Unstructured | Block) -> None:
    weight, hessian = layer(zeros=True)
    found = obs.prune(weight, hessian, pattern)
    assert is_a_curve(found.curve)
    assert found.curve[-1] == (1.0, pytest.approx(1.0, rel=1e-4)), "without weights"
    total = (found.loss + found.damping_loss) / whole(weight, hessian)
    before, after = (
        max(loss for share, loss in found.curve if share <= 0.5),
        min(loss for share, loss in found.curve if share >= 0.5),
    )
    assert before * 0.9999 <= total <= after * 1.0001


@pytest.mark.parametrize("backend", ["numba", "torch", "naive"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_curve_of_rounding_ends_at_the_loss_of_the_greedy_codes(masked: bool, backend: str) -> None:
    weight, hessian = layer()
    start, mask = weight, None
    if masked:
        pruned = obs.prune(weight, hessian, "2:4")
        start, mask = pruned.weight, pruned.mask
    found = obs.quantize(start, hessian, IntGrid(3), mask=mask, order="greedy", backend=backend)
    assert is_a_curve(found.curve)
    assert found.curve[-1][0] == 1.0
    expected = (found.loss + found.damping_loss) / whole(start, hessian)
    assert found.curve[-1][1] == pytest.approx(expected, rel=1e-4)
    refined = obs.quantize(start, hessian, IntGrid(3), mask=mask, order="greedy", backend=backend, refine=True)
    assert refined.loss < found.loss
    assert refined.curve == found.curve, "the sweep's, before refinement"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["activation", "ascending"])
def test_a_curve_of_columns_ends_at_the_loss_of_their_codes(order: Order, masked: bool) -> None:
    weight, hessian = layer()
    mask = (weight.abs() > 0.3) if masked else None
    start = weight if mask is None else weight * mask
    act_order = order == "activation"
    for found in (
        obs.quantize(start, hessian, IntGrid(3), mask=mask, order=order),
        baselines.gptq(start, hessian, IntGrid(3), mask=mask, act_order=act_order, block=7),
    ):
        assert is_a_curve(found.curve)
        expected = (found.loss + found.damping_loss) / whole(start, hessian)
        assert found.curve[-1] == (1.0, pytest.approx(expected, rel=1e-4))


def test_every_point_of_a_column_curve_is_what_fixing_so_many_columns_costs() -> None:
    """The best that free columns can do about the error of those before them, by least squares."""
    weight, hessian = layer(groups=1)
    found = baselines.gptq(weight.double(), hessian, IntGrid(3))
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(24, dtype=hessian.dtype)
    assert len(found.curve) == 24
    for count, (share, loss) in enumerate(found.curve, 1):
        error = (found.weight - weight.double())[0, :, :count]
        # The Schur complement of the free columns.
        left = torch.linalg.inv(torch.linalg.inv(damped)[:count, :count])
        assert share == pytest.approx(count / 24)
        assert loss * whole(weight, hessian) == pytest.approx(float(((error @ left) * error).sum() / 2), rel=1e-8)


@pytest.mark.parametrize("grid", [None, 4])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), Block(4, 0.5)], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_a_curve_of_sparsegpt_ends_at_the_loss_of_the_solution(
    pattern: Unstructured | NM | Block, grid: int | None, act_order: bool
) -> None:
    weight, hessian = layer(zeros=True)
    found = baselines.sparsegpt(weight, hessian, pattern, grid=grid, act_order=act_order, block=8)
    assert is_a_curve(found.curve)
    expected = (found.loss + found.damping_loss) / whole(weight, hessian)
    share = found.sparsity if grid is None else 1.0
    assert found.curve[-1] == (pytest.approx(share), pytest.approx(expected, rel=1e-4))


def test_solvers_without_steps_have_no_curve() -> None:
    weight, hessian = layer()
    assert obs.quantize(weight, torch.eye(24, dtype=torch.float64).expand(2, 24, 24), IntGrid(4)).curve == ()
    assert baselines.magnitude(weight, hessian, "2:4").curve == ()
    assert baselines.adaprune(weight, hessian, "2:4").curve == ()
    assert baselines.round_to_nearest(weight, hessian, 4).curve == ()
    assert obs.prune(torch.zeros_like(weight), hessian, "2:4").curve == ()


def test_curves_survive_being_taken_apart() -> None:
    weight, hessian = layer()
    found = obs.prune(weight, hessian, "2:4")
    scalars, tensors = solution_parts(found)
    assert solution_from_parts(scalars, tensors, weight.device).curve == found.curve
    del scalars["curve"]
    assert solution_from_parts(scalars, tensors, weight.device).curve == (), "of a store that is older than curves"


def test_points_by_hand() -> None:
    losses = torch.tensor([[1.0, 5.0, 2.0], [2.0, 3.0, 9.0]])
    heap = [1.0, 3.0, 6.0, 11.0, 13.0, 22.0]
    assert heap_curve(losses, points=99) == tuple(((k + 1) / 6, loss) for k, loss in enumerate(heap))
    assert line(torch.tensor([1.0, 2.0]), whole=4, points=9) == ((0.25, 1.0), (0.5, 3.0))
    count, fixed = torch.tensor([3, 2]), torch.tensor([0, 1])
    assert step_curve(torch.tensor([[1.0, 5, 2], [0, 3, 0]]), count, fixed, whole=4) == (
        (0.25, 1.0),
        (0.75, 9.0),
        (1.0, 11.0),
    )
    assert line(torch.tensor([0.0, 0.0])) == line(torch.tensor([])) == line(torch.tensor([float("inf")])) == ()
