"""The exact refit on a mask: against the textbook formula, and where float32 alone is not enough."""

from __future__ import annotations

import pytest
import torch

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.kernels.masked_refit import masked_refit
from lightning_obc.kernels.masked_refit.refit import refit_batched
from lightning_obc.linalg import safe_inverse


def hessian(groups: int, columns: int, samples: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(groups, columns, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 * x @ x.mT / samples


def dense_refit(h: torch.Tensor, dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row from the textbook formula."""
    out = torch.zeros_like(dense, dtype=torch.float64)
    for g in range(dense.shape[0]):
        for r in range(dense.shape[1]):
            kept = mask[g, r].nonzero().flatten()
            right = (h[g] @ dense[g, r].double())[kept]
            out[g, r, kept] = torch.linalg.solve(h[g][kept][:, kept], right)
    return out


@pytest.mark.parametrize("with_inverse", [False, True])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 7, 20), (3, 4, 9), (40, 1, 9), (1, 1, 1)])
def test_refit_equals_the_row_by_row_solve(
    groups: int, rows: int, columns: int, budget: int | None, with_inverse: bool
) -> None:
    result = safe_inverse(hessian(groups, columns, 3 * columns), 1e-2)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(groups, rows, columns, generator=generator)
    mask = torch.rand(groups, rows, columns, generator=generator) < torch.rand(groups, rows, 1, generator=generator)
    mask[0, 0] = True
    mask[-1, -1] = False
    inverse = result.inverse if with_inverse else None
    got = masked_refit(result.damped_hessian, dense, mask, inverse=inverse, memory_budget=budget)
    torch.testing.assert_close(got, dense_refit(result.damped_hessian, dense, mask), rtol=1e-9, atol=1e-11)
    pruned = got[~mask]
    assert torch.equal(pruned, torch.zeros_like(pruned))
    assert not torch.signbit(pruned).any()
    if groups * rows > 1:
        assert torch.equal(got[0, 0], dense[0, 0].double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_any_floating_type_are_refitted_as_their_float64_values(dtype: torch.dtype) -> None:
    result = safe_inverse(hessian(2, 33, 99), 1e-2)
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(2, 3, 33, generator=generator).to(dtype)
    mask = torch.rand(2, 3, 33, generator=generator) < 0.6
    got = masked_refit(result.damped_hessian, dense, mask, inverse=result.inverse)
    wide = masked_refit(result.damped_hessian, dense.double(), mask, inverse=result.inverse)
    assert got.dtype == torch.float64
    assert torch.equal(got, wide)


def test_refit_is_not_worse_than_any_perturbation() -> None:
    result = safe_inverse(hessian(1, 15, 40), 1e-2)
    h = result.damped_hessian[0]
    dense = torch.randn(1, 3, 15, dtype=torch.float64)
    mask = torch.rand(1, 3, 15) < 0.5
    best = masked_refit(result.damped_hessian, dense, mask)
    step = (best - dense)[0]
    loss = (step @ h * step).sum()
    for _ in range(20):
        other = step + 1e-3 * torch.randn_like(step) * mask[0]
        assert (other @ h * other).sum() >= loss


@pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-10])
@pytest.mark.parametrize("with_inverse", [False, True])
def test_refit_is_accurate_where_float32_is_not(damping: float, with_inverse: bool) -> None:
    """Refinement converges at the first two dampings; the third needs, and gets, a float64 factor."""
    result = safe_inverse(hessian(2, 150, 60) * 1e30, damping)
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(2, 3, 150, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 3, 150, generator=generator) < 0.7
    inverse = result.inverse if with_inverse else None
    got = masked_refit(result.damped_hessian, dense, mask, inverse=inverse)
    gradient = ((got - dense) @ result.damped_hessian) * mask
    scale = (got - dense).norm() * result.damped_hessian.norm()
    assert (gradient.norm() / scale).item() < 1e-12 / (damping if with_inverse else 1)
    condition = 300 / damping
    torch.testing.assert_close(got, dense_refit(result.damped_hessian, dense, mask), rtol=0, atol=1e-14 * condition)


def test_refit_refuses_an_indefinite_matrix() -> None:
    h = -torch.eye(3, dtype=torch.float64)[None]
    mask = torch.tensor([[[True, True, False]]])
    with pytest.raises(NotPositiveDefiniteError, match="raise damping"):
        masked_refit(h, torch.ones(1, 1, 3), mask)


@pytest.mark.parametrize("with_inverse", [False, True])
@pytest.mark.parametrize("columns", [2, 31, 64, 100])
def test_compiled_and_batched_agree(columns: int, with_inverse: bool) -> None:
    """Ragged sizes, and more rows than share a product."""
    result = safe_inverse(hessian(2, columns, 4 * columns), 1e-2)
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(2, 19, columns, generator=generator)
    mask = torch.rand(2, 19, columns, generator=generator) < torch.rand(2, 19, 1, generator=generator)
    inverse = result.inverse if with_inverse else None
    compiled = masked_refit(result.damped_hessian, dense, mask, inverse=inverse)
    batched = refit_batched(result.damped_hessian, dense, mask, inverse, 10**6)
    torch.testing.assert_close(compiled, batched, rtol=1e-11, atol=1e-13)


def test_same_result_whatever_the_threads() -> None:
    result = safe_inverse(hessian(2, 80, 200), 1e-2)
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(2, 9, 80, generator=generator)
    mask = torch.rand(2, 9, 80, generator=generator) < 0.5
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = masked_refit(result.damped_hessian, dense, mask)
        torch.set_num_threads(2)
        together = masked_refit(result.damped_hessian, dense, mask)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)
