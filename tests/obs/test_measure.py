"""The error between any two weights, against sums over the samples themselves."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_obc.errors import ShapeError
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.obs.measure import relative_error
from lightning_obc.obs.problem import quadratic

GROUPS, ROWS, COLUMNS, SAMPLES = 2, 3, 5, 12


def statistic(inputs: torch.Tensor) -> Hessian:
    """Of ``[g, d, n]``, the first third of the samples in one half."""
    halves = torch.stack([part @ part.mT for part in inputs.split([SAMPLES // 3, SAMPLES - SAMPLES // 3], -1)])
    return Hessian(halves, (SAMPLES // 3, SAMPLES - SAMPLES // 3))


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, GROUPS, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, GROUPS, COLUMNS, SAMPLES, generator=generator, dtype=torch.float64)
    return *weights, *inputs


def test_of_one_statistic_and_of_inputs_before_and_after() -> None:
    before, weight, inputs, other = problem()
    expected = (before @ inputs - weight @ inputs).square().sum() / (before @ inputs).square().sum()
    assert relative_error(before, weight, statistic(inputs)) == pytest.approx(float(expected))
    moved = inputs + 0.3 * other
    cross, apart = (2 * (inputs - moved) @ side.mT / SAMPLES for side in (moved, inputs - moved))
    paired = PairedHessian(statistic(moved), cross, apart)
    expected = (before @ inputs - weight @ moved).square().sum() / (before @ inputs).square().sum()
    assert relative_error(before, weight, paired) == pytest.approx(float(expected))
    assert relative_error(before, before, statistic(inputs)) == 0


def test_of_rows_that_are_looked_up() -> None:
    """Row ``r`` is an output as often as it is counted, beside the outputs of the layer that it is tied to."""
    before, weight, inputs, _ = (tensor[:1] for tensor in problem())
    rows = torch.tensor([[[1.0, 0.0, 2.0]], [[4.0, 1.0, 0.0]]], dtype=torch.float64)
    counts = rows.sum((0, 1))

    def output(values: torch.Tensor) -> torch.Tensor:
        return (values @ inputs).square().sum() + (counts[:, None] * values[0].square()).sum()

    counted = Hessian(statistic(inputs).halves, statistic(inputs).samples, rows=rows)
    expected = output(weight - before) / output(before)
    assert relative_error(before, weight, counted) == pytest.approx(float(expected))


def test_what_does_not_fit_is_refused() -> None:
    before, weight, inputs, _ = problem()
    with pytest.raises(ShapeError, match=r"\[2, R, 5\] of both"):
        relative_error(before[:1], weight, statistic(inputs))


def test_broken_numbers_are_no_error_of_zero() -> None:
    before, weight, inputs, _ = problem()
    weight[0, 0, 0] = torch.nan
    assert math.isnan(relative_error(before, weight, statistic(inputs)))
    assert math.isnan(quadratic(weight - before, statistic(inputs).full()))
