"""The engine's answers do not depend on the scale of the activations, as far as float32 sweeps would ever see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_obc.obs import LayerSolution, prune, quantize, sweep
from lightning_obc.specs import NM, IntGrid, Unstructured


def _problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 60, generator=generator, dtype=torch.float64)
    return torch.randn(6, 24, generator=generator), 2 * x @ x.T / 60


RUNS: dict[str, Callable[[Tensor, Tensor, str], LayerSolution]] = {
    "unstructured": lambda w, h, b: prune(w, h, Unstructured(0.6), backend=b),
    "2:4": lambda w, h, b: prune(w, h, NM(2, 4), backend=b),
    "3 bits": lambda w, h, b: quantize(w, h, IntGrid(3), backend=b),
}


@pytest.mark.parametrize("exponent", [-140, -20, 20, 140])
@pytest.mark.parametrize("backend", ["naive", "torch", "numba"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_same_bits_for_inputs_of_any_scale(run: Any, backend: str, exponent: int) -> None:
    weight, hessian = _problem()
    expected = run(weight, hessian, backend)
    got = run(weight, hessian * 2.0**exponent, backend)
    assert torch.equal(got.weight, expected.weight)
    assert torch.equal(got.mask, expected.mask)
    assert got.loss == pytest.approx(expected.loss * 2.0**exponent, rel=1e-12)
    assert got.status.notes == expected.status.notes


def test_losses_of_a_sweep_are_in_the_units_of_the_hessian() -> None:
    weight, hessian = _problem()
    first, second = sweep(weight, hessian), sweep(weight, hessian * 2.0**20)
    assert torch.equal(first.order, second.order)
    torch.testing.assert_close(second.losses, first.losses * 2.0**20, rtol=1e-6, atol=0)


def test_groups_of_very_different_scales_are_solved_each_as_alone() -> None:
    weight, hessian = _problem()
    scales = torch.tensor([2.0**-140, 1.0, 0.0, 2.0**130], dtype=torch.float64)
    weights, hessians = weight.expand(4, -1, -1).contiguous(), hessian * scales[:, None, None]
    got, expected = quantize(weights, hessians, IntGrid(4)), quantize(weight, hessian, IntGrid(4))
    for group in (0, 1, 3):
        assert torch.equal(got.weight[group], expected.weight)
    pruned = prune(weights[:2], hessians[:2], Unstructured(0.5))
    # The first group costs next to nothing: its weights go first.
    assert not pruned.mask[0].any()
    assert pruned.mask[1].all()
