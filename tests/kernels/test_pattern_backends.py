"""Every pattern on every backend: from the zeros that are there already to what the book says; the rest is refused."""

from __future__ import annotations

import math
from functools import lru_cache
from unittest import mock

import pytest
import torch
from pattern_oracle import best_on, codes_of, mask_of
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import BackendError, SpecError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.kernels.obs_sweep import block_backend, dispatch, resolve_among
from lightning_obc.specs import NM, Block, IntGrid, Pattern, Prune, Structured, Unstructured

ROWS, CHANNELS, POSITIONS = 4, 8, 3
PATTERNS: list[Pattern] = [
    *(Unstructured(sparsity) for sparsity in (0.1, 0.5, 0.85)),
    *(NM(*pair) for pair in ((1, 4), (2, 4), (3, 4), (1, 2), (3, 8))),
    Block(4, 0.5),
    Block(2, 0.2),
    Structured(0.5),
]
GRIDS = [
    IntGrid(bits, symmetric=symmetric, granularity=granularity, group_size=4 if granularity == "group" else None)
    for bits, symmetric in ((4, False), (3, True))
    for granularity in ("tensor", "channel", "group")
] + [IntGrid(1)]
# Triton's own tests run its sweep under the interpreter, in a process of their own.
BACKENDS = ["naive", "torch", "numba", pytest.param("triton", marks=pytest.mark.gpu)]
REFUSED = [(Block(9, 0.5), "triton")]
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@lru_cache
def layer() -> tuple[Tensor, Tensor]:
    """``[2, R, d]`` with zeros of all kinds (a row, a column, a channel, a block, others), and ``[2, d, d]``."""
    columns, generator = CHANNELS * POSITIONS, torch.Generator().manual_seed(0)
    x = torch.randn(2, columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(2, columns, 2 * columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, ROWS, columns, generator=generator, dtype=torch.float64)
    weight[torch.rand(weight.shape, generator=generator) < 0.15] = 0.0
    weight[0, 1] = 0.0
    weight[1, :, 5] = 0.0
    weight.view(2, ROWS, POSITIONS, CHANNELS)[1, ..., 2] = 0.0
    weight[0, 0, 8:12] = 0.0
    weight[1, 3, 13:16] = 0.0
    # A negative zero is a zero, and does not stay negative.
    weight[0, 2, 0] = -0.0
    return weight, 2 * x @ x.mT / (2 * columns)


def damped() -> Tensor:
    hessian = layer()[1]
    bar = 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)
    return hessian + bar[:, None, None] * torch.eye(hessian.shape[-1], dtype=torch.float64)


@lru_cache
def expected_mask(pattern: Pattern) -> Tensor:
    return mask_of(pattern, layer()[0], damped(), CHANNELS)


def device_of(backend: str) -> str:
    if backend != "triton":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


def prune(pattern: Pattern, backend: str, dtype: torch.dtype) -> obs.LayerSolution:
    device = device_of(backend)
    weight, hessian = layer()
    return obs.prune(weight.to(device, dtype), hessian.to(device), pattern, channels=CHANNELS, backend=backend)


def assert_zeros_stay(weight: Tensor, gone: Tensor) -> None:
    zeros = weight.cpu()[gone]
    assert torch.equal(zeros, torch.zeros_like(zeros))
    assert not bool(torch.signbit(zeros).any()), "a negative zero"


def assert_counts_include_them(pattern: Pattern, mask: Tensor) -> None:
    """The pattern asks for so many zeros, and makes no more than it lacks."""
    kept, before = mask.cpu(), layer()[0] != 0
    if isinstance(pattern, NM):
        by_group = [m.reshape(-1, pattern.m).sum(1) for m in (kept, before)]
        assert torch.equal(by_group[0], by_group[1].clamp(max=pattern.n))
        return
    if isinstance(pattern, Block):
        units, already = ((~m.reshape(-1, pattern.size).any(1)) for m in (kept, before))
    elif isinstance(pattern, Structured):
        units, already = ((~m.reshape(2, -1, CHANNELS).any(1)).flatten() for m in (kept, before))
    else:
        units, already = ((~m).flatten() for m in (kept, before))
    wanted = math.ceil(round(pattern.sparsity * len(units), 6))  # type: ignore[attr-defined]
    assert bool(units[already].all())
    assert int(units.sum()) == max(wanted, int(already.sum()))


@by_backend
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruning_starts_from_the_zeros_that_are_there(pattern: Pattern, backend: str) -> None:
    weight, _ = layer()
    exact, single = (prune(pattern, backend, dtype) for dtype in (torch.float64, torch.float32))
    assert torch.equal(exact.mask.cpu(), expected_mask(pattern))
    expected = best_on(weight, damped(), expected_mask(pattern))
    torch.testing.assert_close(exact.weight.cpu(), expected, rtol=1e-8, atol=1e-10)
    for solution in (exact, single):
        assert_zeros_stay(solution.weight, ~solution.mask.cpu())
        assert not bool(solution.mask.cpu()[weight == 0].any())
        assert_counts_include_them(pattern, solution.mask)
    assert single.loss + single.damping_loss == pytest.approx(exact.loss + exact.damping_loss, rel=1e-4)


def check_codes(start: Tensor, keep: Tensor, spec: IntGrid, backend: str) -> None:
    """Greedy codes of ``start`` on its mask are those of the oracle; in any order zeros stay."""
    device, hessian = device_of(backend), layer()[1]
    options = {"mask": keep.to(device), "channels": CHANNELS, "backend": backend}
    greedy = obs.quantize(start.to(device), hessian.to(device), spec, order="greedy", **options)
    grid = fit_grid(start, spec, channels=CHANNELS, hessian=damped())
    spread = (grid.expand(part, start.shape[-1]) for part in (grid.scale, grid.zero_point))
    assert greedy.codes is not None
    assert torch.equal(greedy.codes.cpu(), codes_of(start, damped(), keep, *spread, grid.max_code))
    single = obs.quantize(start.to(device).float(), hessian.to(device), spec, refine=True, **options)
    for solution in (greedy, single):
        assert_zeros_stay(solution.weight, ~keep)
        assert torch.equal(solution.mask.cpu(), keep)
        assert solution.grid is not None
        assert solution.codes is not None
        zero_point = solution.grid.expand(solution.grid.zero_point, start.shape[-1])
        assert torch.equal(solution.codes.cpu()[~keep], zero_point.cpu()[~keep].to(torch.uint8))


@by_backend
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_codes_start_from_the_zeros_that_are_there(spec: IntGrid, backend: str) -> None:
    weight, _ = layer()
    check_codes(weight, weight != 0, spec, backend)


@by_backend
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), Block(4, 0.5), Structured(0.5)], ids=str)
def test_zeros_first_then_codes(pattern: Pattern, backend: str) -> None:
    mask = expected_mask(pattern)
    check_codes(best_on(layer()[0], damped(), mask), mask, IntGrid(3), backend)


@pytest.mark.parametrize(("pattern", "backend"), REFUSED, ids=str)
def test_a_backend_without_the_pattern_is_refused_by_name(pattern: Pattern, backend: str) -> None:
    weight, hessian = torch.randn(3, 18), torch.eye(18, dtype=torch.float64)
    with pytest.raises(BackendError, match=f"cannot solve this pattern.*'{backend}'"):
        obs.prune(weight, hessian, pattern, backend=backend)
    with pytest.raises(SpecError, match=f"cannot solve this pattern.*'{backend}'"):
        Prune(pattern, backend=backend)
    if isinstance(pattern, Block):
        with pytest.raises(BackendError, match="blocks of 9"):
            obs.sweep_blocks(weight, hessian, 9, backend=backend)


@pytest.mark.parametrize("pattern", [Block(9, 0.5), Structured(0.5)], ids=str)
def test_the_others_solve_it(pattern: Pattern) -> None:
    weight, hessian = torch.randn(3, 18), torch.eye(18, dtype=torch.float64)
    for backend in ("auto", "naive", "torch", "numba"):
        Prune(pattern, backend=backend)
        assert obs.prune(weight, hessian, pattern, backend=backend).sparsity == 0.5


def test_auto_takes_torch_where_the_first_choice_lacks_the_pattern() -> None:
    with (
        mock.patch.dict(dispatch._PREFERENCE, {"cuda": ("triton", "torch")}),
        mock.patch.object(dispatch, "_importable", return_value=True),
    ):
        assert dispatch.resolve_backend("auto", "cuda") == "triton"
        assert block_backend("auto", "cuda", 8) == "triton"
        assert block_backend("auto", "cuda", 9) == "torch"
        assert resolve_among("auto", "cuda", ("torch",), "a pattern") == "torch"
    Prune(Block(8, 0.5), backend="triton")
