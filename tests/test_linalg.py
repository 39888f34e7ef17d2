"""Damping and safe inverses."""

from __future__ import annotations

import pytest
import torch

from lightning_obc.errors import AsymmetricHessianError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from lightning_obc.linalg import damped, dead_columns, resolve_budget, safe_inverse, symmetrised


def hessian(groups: int, columns: int, samples: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(groups, columns, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 * x @ x.mT / samples


def test_damping_adds_a_share_of_the_mean_diagonal_and_leaves_the_input_alone() -> None:
    h = hessian(3, 5, 20)
    before = h.clone()
    result, lam_bar = damped(h, 0.1)
    torch.testing.assert_close(lam_bar, 0.1 * h.diagonal(dim1=1, dim2=2).mean(1))
    torch.testing.assert_close(result - h, lam_bar[:, None, None] * torch.eye(5, dtype=h.dtype).expand(3, 5, 5))
    assert torch.equal(h, before)


def test_inverse_inverts_and_is_symmetric() -> None:
    result = safe_inverse(hessian(4, 17, 60), 1e-2)
    eye = torch.eye(17, dtype=torch.float64).expand(4, 17, 17)
    torch.testing.assert_close(result.inverse @ result.damped_hessian, eye, atol=1e-10, rtol=0)
    assert torch.equal(result.inverse, result.inverse.mT)
    assert result.notes == ()
    assert result.damping.tolist() == [0.01] * 4


def test_only_the_failing_problem_is_retried_and_recorded() -> None:
    h = hessian(2, 12, 40)
    h[1] = hessian(1, 12, 3)[0]
    result = safe_inverse(h, 0.0)
    assert result.damping[0] == 0
    assert result.damping[1] == pytest.approx(1e-6)
    assert len(result.notes) == 1
    assert "problem 1" in result.notes[0]
    eye = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    torch.testing.assert_close(result.inverse @ result.damped_hessian, eye, atol=1e-7, rtol=0)


def test_dead_columns_are_found_before_damping_and_couple_with_nothing() -> None:
    h = hessian(2, 6, 30)
    h[0, 2, :] = 0
    h[0, :, 2] = 0
    assert dead_columns(h).nonzero().tolist() == [[0, 2]]
    for damping in (0.0, 0.01):
        result = safe_inverse(h, damping)
        alive = [0, 1, 3, 4, 5]
        assert torch.equal(result.inverse[0, 2, alive], torch.zeros(5, dtype=h.dtype))
        expected = torch.linalg.inv(result.damped_hessian[0][alive][:, alive])
        torch.testing.assert_close(result.inverse[0][alive][:, alive], expected)
        assert result.notes == ()


def test_all_columns_dead_gives_the_unit_matrix() -> None:
    for damping in (0.0, 0.01):
        result = safe_inverse(torch.zeros(1, 3, 3, dtype=torch.float64), damping)
        assert torch.equal(result.inverse[0], torch.eye(3, dtype=torch.float64))


def test_indefinite_matrix_raises_after_bounded_retries() -> None:
    h = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))[None]
    with pytest.raises(NotPositiveDefiniteError, match="Remedy: raise damping"):
        safe_inverse(h, 1e-4, retries=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hessian_is_named(value: float) -> None:
    h = hessian(2, 4, 10)
    h[1, 0, 3] = value
    with pytest.raises(NonFiniteError, match=r"problems \[1\]"):
        safe_inverse(h, 0.01)


def test_wrong_type_is_named() -> None:
    with pytest.raises(ShapeError, match="float64"):
        safe_inverse(hessian(1, 4, 10).float(), 0.01)


def test_a_symmetric_matrix_is_handed_on_without_a_copy() -> None:
    h = hessian(2, 700, 900)
    h = h + h.mT
    assert symmetrised(h) is h


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_triangles_that_were_rounded_apart_are_evened_out(dtype: torch.dtype) -> None:
    """Nearest in one triangle, a step away in the other: the most that one rounding can do."""
    h = hessian(2, 300, 900)
    rounded = h.to(dtype).double()
    rounded += torch.triu(torch.finfo(dtype).eps * rounded, 1)
    got = symmetrised(rounded)
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(got, rounded, rtol=torch.finfo(dtype).eps, atol=0)


def spoiled(kind: str) -> tuple[torch.Tensor, str]:
    h = hessian(2, 600, 800)
    if kind == "one triangle":
        return torch.tril(h), "problem"
    if kind == "one entry":
        h[1, 590, 3] += 0.04 * float((h[1, 590, 590] * h[1, 3, 3]).sqrt())
        return h, r"H\[(590, 3|3, 590)\].*problem 1"
    if kind == "a dead column":
        h[0, 7] = h[0, :, 7] = 0.0
        h[0, 7, 300] = 1e-9
        return h, r"H\[(7, 300|300, 7)\].*problem 0: inf"
    return h + torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=h.dtype), "problem"


@pytest.mark.parametrize("kind", ["one triangle", "one entry", "a dead column", "noise"])
def test_gross_asymmetry_is_named_with_its_place(kind: str) -> None:
    h, match = spoiled(kind)
    before = h.clone()
    with pytest.raises(AsymmetricHessianError, match=match) as caught:
        symmetrised(h)
    assert caught.value.remedy is not None
    assert torch.equal(h, before)


def test_infinity_in_one_triangle_is_not_called_asymmetry() -> None:
    h = hessian(1, 4, 10)
    h[0, 1, 3] = float("inf")
    with pytest.raises(NonFiniteError):
        symmetrised(h)


def test_budget_defaults_to_a_share_of_free_memory() -> None:
    assert resolve_budget(123, torch.device("cpu")) == 123
    assert resolve_budget(None, torch.device("cpu")) > 2**20


def test_a_wholly_dead_problem_is_nearly_free_beside_tiny_ones() -> None:
    tiny = hessian(1, 4, 20)[0] * 1e-12
    result, lam_bar = damped(torch.stack([tiny, torch.zeros_like(tiny), 1e6 * tiny]), 0.01)
    assert lam_bar[1] == 0
    dead = result[1].diagonal()
    assert bool((dead > 0).all())
    assert bool((dead < 1e-6 * tiny.diagonal().min()).all())
