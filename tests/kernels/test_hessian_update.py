from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.hessian_update import (
    ConvGeometry,
    accumulate_conv_,
    accumulate_linear_,
    exact_products,
    naive_conv,
    naive_linear,
    symmetrise_,
)
from lightning_obc.kernels.hessian_update.linear import CHUNK, STRIP
from lightning_obc.kernels.hessian_update.rows import accumulate_rows_, rows_pay


def poisoned(groups: int, columns: int) -> torch.Tensor:
    """Zeros above, NaN below the diagonal: whatever reads the lower triangle is found out."""
    out = torch.full((groups, columns, columns), torch.nan, dtype=torch.float64).tril(-1)
    return out


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("columns", [1, 7, STRIP, STRIP + 1, 2 * STRIP + 5])
@pytest.mark.parametrize("positions", [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_linear_equals_naive(groups: int, columns: int, positions: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(positions, groups, columns)
    out = poisoned(groups, columns)
    accumulate_linear_(out, x)
    torch.testing.assert_close(symmetrise_(out), naive_linear(x), rtol=1e-6, atol=1e-4)
    assert torch.equal(out, out.mT)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_conv_equals_naive_on_ragged_geometries(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    dims = draw(1, 3)
    groups, per_group, samples = draw(1, 3), draw(1, 3), draw(1, 4)
    kernel = tuple(draw(1, 3) for _ in range(dims))
    dilation = tuple(draw(1, 2) for _ in range(dims))
    geometry = ConvGeometry(
        kernel_size=kernel,
        stride=tuple(draw(1, 3) for _ in range(dims)),
        dilation=dilation,
        padding=tuple((draw(0, 2), draw(0, 2)) for _ in range(dims)),
        padding_mode=data.draw(st.sampled_from(["constant", "replicate"])),
        groups=groups,
    )
    size = tuple(dil * (k - 1) + draw(1, 5) for k, dil in zip(kernel, dilation, strict=True))
    x = torch.randn(samples, groups * per_group, *size, dtype=torch.float64)
    out = poisoned(groups, geometry.positions * per_group)
    accumulate_conv_(out, x, geometry)
    torch.testing.assert_close(symmetrise_(out), naive_conv(x, geometry), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(40, 41), (3, 1500), (1500, 2), (6, 6)])
def test_conv_equals_naive_over_several_strips(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 2), (1, 1), (1, 1), ((1, 1), (0, 1)))
    x = torch.randn(70 if size == (6, 6) else 2, 3, *size)
    out = poisoned(1, 18)
    accumulate_conv_(out, x, geometry)
    torch.testing.assert_close(symmetrise_(out), naive_conv(x, geometry), rtol=1e-6, atol=1e-3)


ROWS = {
    "3x3": (ConvGeometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))), (20, 2, 16, 15)),
    "strides and dilations along the columns": (
        ConvGeometry((3, 2), (1, 2), (1, 3), ((0, 2), (1, 0)), "replicate"),
        (10, 3, 30, 31),
    ),
    "dilated rows": (ConvGeometry((3, 3), (1, 1), (2, 1), ((2, 2), (1, 1))), (9, 2, 24, 21)),
    "even": (ConvGeometry((2, 4), (1, 1), (1, 1), ((0, 1), (1, 2))), (3, 2, 40, 39)),
    "long rows": (ConvGeometry((2, 3), (1, 1), (1, 1), ((0, 0), (1, 1))), (1, 2, 8, 1500)),
    "one dimension": (ConvGeometry((5,), (1,), (1,), ((2, 2),)), (40, 3, 130)),
    "three dimensions": (ConvGeometry((2, 2, 3), (1, 2, 1), (1, 1, 1), ((0, 0), (0, 1), (1, 1))), (5, 2, 9, 15, 14)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROWS)
def test_the_offset_difference_form_equals_naive(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    geometry, shape = ROWS[name]
    x = torch.randn(shape, dtype=dtype)
    out = poisoned(1, geometry.positions * shape[1])
    accumulate_rows_(out, x, geometry)
    expected = naive_conv(x, geometry)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(symmetrise_(out), expected, rtol=0, atol=tolerance * expected.amax().item())


SQUARE = ((1, 1), (1, 1), ((1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("geometry", "shape", "pays"),
    [
        (ConvGeometry((3, 3), *SQUARE), (2, 24, 32, 32), True),
        (ConvGeometry((3, 3), *SQUARE), (1, 24, 32, 32), False),
        (ConvGeometry((3, 3), *SQUARE), (2, 16, 32, 32), False),
        (ConvGeometry((3, 3), *SQUARE), (90, 24, 7, 7), False),
        (ConvGeometry((3, 3), (2, 1), *SQUARE[1:]), (4, 24, 32, 32), False),
        (ConvGeometry((3, 3), *SQUARE, groups=2), (2, 24, 32, 32), False),
        (ConvGeometry((1, 3), *SQUARE[:2], ((0, 0), (1, 1))), (2, 24, 32, 32), False),
    ],
)
def test_when_the_offset_difference_form_is_taken(geometry: ConvGeometry, shape: tuple[int, ...], pays: bool) -> None:
    x = torch.randn(shape)
    assert rows_pay(x, geometry) == pays
    out = poisoned(geometry.groups, geometry.positions * shape[1] // geometry.groups)
    accumulate_conv_(out, x, geometry)
    expected = naive_conv(x, geometry)
    torch.testing.assert_close(symmetrise_(out), expected, rtol=0, atol=1e-6 * expected.amax().item())


def test_sums_add_up_over_calls_and_memory_format_does_not_matter() -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=2)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    out = poisoned(2, 18)
    accumulate_conv_(out, x[:2], geometry)
    accumulate_conv_(out, x[2:].contiguous(memory_format=torch.channels_last), geometry)
    torch.testing.assert_close(symmetrise_(out), naive_conv(x, geometry))


def test_the_input_is_not_changed() -> None:
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    accumulate_conv_(torch.zeros(1, 3, 3, dtype=torch.float64), x, geometry)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    x = torch.randn(300, 1, 8).to(dtype)
    out = poisoned(1, 8)
    accumulate_linear_(out, x)
    torch.testing.assert_close(symmetrise_(out), naive_linear(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_users_matmul_precision_is_set_aside_and_put_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with exact_products("cpu"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError, match="inside"), exact_products("cpu"):
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_does_not_reach_the_products() -> None:
    x = torch.randn(100, 1, 8)
    out = poisoned(1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulate_linear_(out, x)
    torch.testing.assert_close(symmetrise_(out), naive_linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "x"),
    [
        (torch.zeros(1, 4, 4), torch.zeros(2, 1, 4)),
        (torch.zeros(1, 4, 5, dtype=torch.float64), torch.zeros(2, 1, 4)),
        (torch.zeros(1, 4, 4, dtype=torch.float64), torch.zeros(2, 1, 5)),
        (torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 1, 4)),
        (torch.zeros(1, 4, 4, dtype=torch.float64), torch.zeros(2, 4)),
    ],
)
def test_tensors_that_do_not_belong_together(out: torch.Tensor, x: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="Got"):
        accumulate_linear_(out, x)


def test_conv_inputs_that_do_not_fit() -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    out = torch.zeros(1, 18, 18, dtype=torch.float64)
    with pytest.raises(ShapeError, match="does not fit"):
        accumulate_conv_(out, torch.zeros(1, 3, 5, 5), geometry)
    with pytest.raises(ShapeError, match="does not fit"):
        accumulate_conv_(out, torch.zeros(2, 5, 5), geometry)
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        accumulate_conv_(out, torch.zeros(1, 2, 2, 5), geometry)
