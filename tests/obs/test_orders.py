"""Orders in which codes are found: each is what it says, and ``"auto"`` keeps the best of every row."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_obc import baselines, obs
from lightning_obc.errors import NotPositiveDefiniteError, SpecError
from lightning_obc.obs.problem import row_losses
from lightning_obc.specs import IntGrid, Quantize

ORDERS = ("greedy", "activation", "ascending")
SPECS = [
    IntGrid(4),
    IntGrid(2, symmetric=True),
    IntGrid(3, granularity="tensor"),
    IntGrid(3, granularity="group", group_size=6),
    IntGrid(3, scale="hessian"),
    IntGrid(3, scale="hessian", granularity="tensor"),
    IntGrid(2, scale="hessian", granularity="group", group_size=6),
]


def problem(groups: int = 2, rows: int = 8, columns: int = 24) -> tuple[Tensor, Tensor]:
    """Correlated inputs of different size, on which no order is the best for all rows."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(groups, columns, 2 * columns, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-0.05, 0.05, columns, dtype=torch.float64)[:, None]
    return torch.randn(groups, rows, columns, generator=generator), 2 * x @ x.mT / (2 * columns)


def damped_rows(solution: obs.LayerSolution, weight: Tensor, hessian: Tensor) -> Tensor:
    return row_losses(solution.weight.double() - weight.double(), obs.prepare(weight, hessian, 0.01).damped)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_auto_is_not_above_any_order(spec: IntGrid, masked: bool) -> None:
    weight, hessian = problem()
    mask = None
    if masked:
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6
        weight = weight * mask
    options = {"mask": mask, "channels": 24}
    each = [
        damped_rows(obs.quantize(weight, hessian, spec, order=order, **options), weight, hessian) for order in ORDERS
    ]
    auto = damped_rows(obs.quantize(weight, hessian, spec, **options), weight, hessian)
    if spec.granularity == "tensor" and spec.scale == "hessian":
        each, auto = [rows.sum() for rows in each], auto.sum()
    assert bool((auto <= torch.stack(each).amin(0) * (1 + 1e-6)).all())


@pytest.mark.parametrize("spec", [IntGrid(4), IntGrid(3, granularity="tensor")], ids=str)
def test_every_row_of_auto_is_that_of_an_order_and_no_order_is_the_best_for_all(spec: IntGrid) -> None:
    weight, hessian = problem()
    auto = obs.quantize(weight, hessian, spec)
    same = torch.stack(
        [(obs.quantize(weight, hessian, spec, order=order).weight == auto.weight).all(-1) for order in ORDERS]
    )
    assert bool(same.any(0).all())
    assert not bool(same.all(-1).all(-1).any())


@pytest.mark.parametrize("act_order", [False, True])
def test_fixed_orders_are_those_of_gptq(act_order: bool) -> None:
    weight, hessian = problem()
    got = obs.quantize(weight, hessian, 3, order="activation" if act_order else "ascending")
    expected = baselines.gptq(weight, hessian, 3, act_order=act_order)
    assert torch.equal(got.weight, expected.weight)
    assert got.loss == expected.loss


def test_refinement_is_not_above_auto() -> None:
    weight, hessian = problem()
    plain, refined = (obs.quantize(weight, hessian, 3, refine=flag) for flag in (False, True))
    rows = [damped_rows(solution, weight, hessian) for solution in (plain, refined)]
    assert bool((rows[1] <= rows[0] * (1 + 1e-9)).all())
    assert rows[1].sum() < 0.99 * rows[0].sum()


def test_a_column_order_that_cannot_be_factored_leaves_the_greedy_result() -> None:
    weight, hessian = problem()
    greedy = obs.quantize(weight, hessian, 3, order="greedy")
    with mock.patch.object(
        sys.modules["lightning_obc.obs.quantize"],
        "column_order_codes",
        side_effect=NotPositiveDefiniteError("indefinite"),
    ):
        assert torch.equal(obs.quantize(weight, hessian, 3).weight, greedy.weight)
        with pytest.raises(NotPositiveDefiniteError):
            obs.quantize(weight, hessian, 3, order="ascending")


def test_unknown_orders_are_named() -> None:
    with pytest.raises(SpecError, match="Unknown order"):
        obs.quantize(*problem(), 4, order="descending")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="Unknown order"):
        Quantize(4, order="descending")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match='Expected: solver="obs"'):
        Quantize(4, order="greedy", solver="gptq")
