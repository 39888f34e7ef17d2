"""Columns in one order: the compiled steps give the bits of torch's, and both those of the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_obc.kernels import column_elimination
from lightning_obc.kernels.column_elimination import Targets, fix_columns
from lightning_obc.kernels.column_elimination.fix import _compiled, _torch


def problem(groups: int, columns: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights ``[g, d, R]`` and the upper factor of an inverse Hessian."""
    generator = torch.Generator().manual_seed(columns + rows)
    x = torch.randn(groups, columns, 3 * columns, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(x @ x.mT / columns)
    factor = torch.linalg.cholesky(inverse).mT.to(dtype).contiguous()
    return torch.randn(groups, columns, rows, generator=generator, dtype=torch.float64).to(dtype), factor


def targets_of(weight: Tensor, kind: str) -> Targets:
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(weight.shape, generator=generator) < 0.6 if "mask" in kind else None
    if "grid" not in kind:
        return Targets(keep=keep)
    scale = torch.full_like(weight, 0.3) + 0.1 * torch.rand(weight.shape, generator=generator).to(weight.dtype)
    return Targets(scale, torch.randint(0, 8, weight.shape, generator=generator).to(weight.dtype), 7, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["grid", "mask", "grid and mask", "nothing"])
@pytest.mark.parametrize(("groups", "columns", "rows"), [(1, 1, 1), (2, 33, 63), (1, 96, 65), (1, 130, 1000)])
def test_the_compiled_steps_have_the_bits_of_torch(dtype, kind, groups, columns, rows):
    start, factor = problem(groups, columns, rows, dtype)
    targets, first, last = targets_of(start, kind), columns // 4, max(1, 3 * columns // 4)
    found = []
    for call in (_torch, _compiled):
        weight, errors = start.clone(), torch.full_like(start[:, first:last], -1.0)
        middle = (first + last) // 2
        for part in ((first, middle), (middle, last)):
            call(weight, errors, factor, targets, first, part, last)
        found.append((weight, errors))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    weight, errors = found[1]
    assert torch.equal(weight[:, last:], start[:, last:])
    assert bool((errors != -1.0).all())


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(torch.float32, "_compiled"), (torch.float64, "_compiled"), (torch.bfloat16, "_torch")],
    ids=str,
)
def test_a_cpu_takes_the_compiled_steps(dtype, chosen, monkeypatch):
    taken = []
    for name in ("_compiled", "_torch"):
        monkeypatch.setattr(column_elimination.fix, name, lambda *_, name=name: taken.append(name))
    weight = torch.zeros(1, 2, 3, dtype=dtype)
    fix_columns(weight, weight.clone(), torch.eye(2, dtype=dtype)[None], Targets(), 0, (0, 2), 2)
    assert taken == [chosen]


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(column_elimination.fix, "_WORTH_A_THREAD", 0)
    start, factor = problem(1, 64, 300, torch.float32)
    targets, found = targets_of(start, "grid"), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weight, errors = start.clone(), torch.empty_like(start)
        fix_columns(weight, errors, factor, targets, 0, (0, 64), 64)
        found.append(weight)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_against_one_elimination_after_another_of_the_inverse():
    """By the definition: column j at its target moves the rest by ``-(w_j - q) / G_jj · G_j:``, and leaves ``G``."""
    weight, factor = problem(1, 12, 5, torch.float64)
    targets = targets_of(weight, "grid and mask")
    expected, inverse = weight[0].clone(), factor[0].mT @ factor[0]
    for column in range(12):
        fixed = targets.at(column, expected[None, column])[0]
        step = (expected[column] - fixed) / inverse[column, column]
        expected -= inverse[column, :, None] * step
        expected[column] = fixed
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        # What is fixed has left the problem.
        inverse[column], inverse[:, column] = 0.0, 0.0
    got, errors = weight.clone(), torch.empty_like(weight)
    fix_columns(got, errors, factor, targets, 0, (0, 12), 12)
    torch.testing.assert_close(got[0], expected, rtol=1e-9, atol=1e-9)


def test_broken_numbers_are_not_hidden():
    weight, factor = problem(1, 8, 4, torch.float32)
    weight[0, 2, 1] = torch.nan
    fix_columns(weight, torch.empty_like(weight), factor, targets_of(weight, "grid"), 0, (0, 8), 8)
    assert bool(weight[0, 2, 1].isnan())
    assert bool(weight[0, :, [0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_rows_and_arrays_of_any_strides(dtype):
    start, factor = problem(2, 20, 9, torch.float32)
    targets = targets_of(start, "grid and mask")

    def turned(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensor.mT.contiguous().mT

    strided = Targets(turned(targets.scale), turned(targets.zero_point), 7, turned(targets.keep))
    found = []
    for call in (_torch, fix_columns):
        weight, errors = turned(start), turned(start)[:, 5:15]
        call(weight, errors, turned(factor), strided, 5, (5, 15), 15)
        found.append((weight, errors))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    fix_columns(weight[..., :0], errors[..., :0], factor.to(dtype), Targets(), 5, (5, 15), 15)
