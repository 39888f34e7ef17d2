"""Recentring against direct least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import ShapeError
from lightning_obc.hessian import Hessian, PairedHessian
from lightning_obc.obs.recentre import against_before, output_error, recentre

N, ROWS, COLUMNS = 60, 5, 7


def inputs(change: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    before = mix @ torch.randn(COLUMNS, N, generator=generator, dtype=torch.float64)
    after = before + change * torch.randn(COLUMNS, N, generator=generator, dtype=torch.float64).cumsum(0)
    return torch.randn(1, ROWS, COLUMNS, generator=generator, dtype=torch.float64), before, after


def paired(before: Tensor, after: Tensor) -> PairedHessian:
    change, n = before - after, before.shape[1]
    halves = torch.stack([after[:, i::2] @ after[:, i::2].T for i in (0, 1)]).unsqueeze(1)
    return PairedHessian(
        Hessian(halves, (n - n // 2, n // 2)), (2 / n * change @ after.T)[None], (2 / n * change @ change.T)[None]
    )


def least_squares(weight: Tensor, before: Tensor, after: Tensor, lam_bar: float, mask: Tensor) -> Tensor:
    """Row by row: ``‖w X - w' X'‖²·2/n + λ̄‖w' - w‖²`` over the kept columns, as one stacked system."""
    scale = (2 / before.shape[1]) ** 0.5
    result = torch.zeros_like(weight)
    for row in range(weight.shape[1]):
        kept = mask[0, row]
        left = torch.cat([scale * after[kept].T, lam_bar**0.5 * torch.eye(int(kept.sum()), dtype=torch.float64)])
        right = torch.cat([scale * weight[0, row] @ before, lam_bar**0.5 * weight[0, row, kept]])
        result[0, row, kept] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return result


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_equals_damped_least_squares(sparse: bool, damping: float) -> None:
    weight, before, after = inputs(0.3)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > (0.5 if sparse else -1.0)
    weight = weight * mask
    statistic = paired(before, after)
    lam_bar = damping * float(statistic.hessian.full().diagonal(dim1=-2, dim2=-1).mean())
    expected = least_squares(weight, before, after, lam_bar, mask)
    found = recentre(weight, statistic, damping=damping)
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(found.weight != 0, mask)
    halfway = recentre(weight, statistic, mixing=0.5, damping=damping).weight
    torch.testing.assert_close(halfway, (weight + expected) / 2, rtol=1e-9, atol=1e-10)


def test_unchanged_inputs_and_no_mixing_leave_every_bit() -> None:
    weight, before, after = inputs(0.3)
    for dtype in (torch.float32, torch.float64):
        own = weight.to(dtype)
        assert torch.equal(recentre(own, paired(before, before)).weight, own)
        assert torch.equal(recentre(own, paired(before, after), mixing=0).weight, own)
    assert recentre(weight, paired(before, before)).inherited == 0


def test_errors_are_the_measured_ones() -> None:
    weight, before, after = inputs(0.3)
    statistic = paired(before, after)

    def measured(other: Tensor) -> float:
        return float((weight @ before - other @ after).square().sum() / N)

    for other in (weight, torch.zeros_like(weight), torch.randn_like(weight)):
        assert output_error(weight, other, statistic) == pytest.approx(measured(other), rel=1e-9)
    start = recentre(weight, statistic)
    assert start.inherited == pytest.approx(measured(start.weight), rel=1e-9)
    solution = against_before(obs.prune(start.weight, statistic.hessian, 0.5), weight, statistic)
    assert solution.loss == pytest.approx(measured(solution.weight), rel=1e-9)
    assert solution.reference == pytest.approx(float((weight @ before).square().sum() / N), rel=1e-9)
    # More of the mismatch is repaired the further the weights go, and nothing beats going all the way.
    inherited = [recentre(weight, statistic, mixing=a, damping=1e-6).inherited for a in (0, 0.25, 0.5, 0.75, 1)]
    assert inherited == sorted(inherited, reverse=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, before, after = inputs(0.3)
    with pytest.raises(ShapeError, match="do not fit"):
        recentre(weight[..., 1:], paired(before, after))
    with pytest.raises(ShapeError, match="cross"):
        PairedHessian(paired(before, after).hessian, torch.zeros(1, 2, 2), torch.zeros(1, 7, 7))
