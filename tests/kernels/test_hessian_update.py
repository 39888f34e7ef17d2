from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.hessian_update import (
    ConvGeometry,
    accumulate_conv_,
    accumulate_cross_conv_,
    accumulate_cross_linear_,
    accumulate_linear_,
    exact_products,
    naive_conv,
    naive_linear,
    symmetrise_,
)
from lightning_obc.kernels.hessian_update.conv import conv_patches
from lightning_obc.kernels.hessian_update.linear import CHUNK, NARROW, STRIP, add_products_
from lightning_obc.kernels.hessian_update.rows import accumulate_rows_, rows_pay

# Largest error of float32 products of CHUNK positions, relative to √(H_ii·H_jj). Whatever order a processor's kernel
# adds in, one running sum over all n positions is the worst. Its partial sum after k terms is about k/n of the end, at
# most √(H_ii·H_jj), and rounds by at most u = 2⁻²⁴ of itself: evenly spread roundings of all steps have the standard
# deviation u·√(Σ (k/n)²/3) = u·√n/3, and the products' own roundings are less. Adding the chunks in float64 keeps the
# relative error. 4·u·√n is twelve deviations; one lost position (1/n), TF32 or bfloat16 operands are far beyond.
PRODUCT_ERROR = 4 * 2**-24 * CHUNK**0.5
# The same for sums in float64, u = 2⁻⁵³, of at most this many positions.
DOUBLE_ERROR = 4 * 2**-53 * 4096**0.5


def assert_equals(out: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    """No element differs by more than ``error · √(H_ii·H_jj)``, what its terms can add up to (Cauchy–Schwarz)."""
    size = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    excess = (out - expected).abs() - error * size.unsqueeze(-1) * size.unsqueeze(-2)
    assert excess.amax() <= 0, f"{excess.amax():.1e} beyond {error:.1e}·√(H_ii·H_jj)"


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
    error = DOUBLE_ERROR if groups * columns <= NARROW else PRODUCT_ERROR
    assert_equals(symmetrise_(out), naive_linear(x), error)
    assert torch.equal(out, out.mT)


@pytest.mark.parametrize("positions", [3, CHUNK])
def test_a_lost_position_is_beyond_the_bound(positions: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(positions, 1, 64)
    with pytest.raises(AssertionError, match="beyond"):
        assert_equals(naive_linear(x[1:]), naive_linear(x), PRODUCT_ERROR)
    with pytest.raises(AssertionError, match="beyond"):
        assert_equals(naive_linear(x.bfloat16()), naive_linear(x), PRODUCT_ERROR)


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
    assert_equals(symmetrise_(out), naive_conv(x, geometry), DOUBLE_ERROR)


@pytest.mark.parametrize("size", [(40, 41), (3, 1500), (1500, 2), (6, 6)])
def test_conv_equals_naive_over_several_strips(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 2), (1, 1), (1, 1), ((1, 1), (0, 1)))
    x = torch.randn(70 if size == (6, 6) else 2, 3, *size)
    out = poisoned(1, 18)
    accumulate_conv_(out, x, geometry)
    assert_equals(symmetrise_(out), naive_conv(x, geometry), DOUBLE_ERROR)


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
    error = PRODUCT_ERROR if dtype == torch.float32 else DOUBLE_ERROR
    assert_equals(symmetrise_(out), naive_conv(x, geometry), error)


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
    assert_equals(symmetrise_(out), naive_conv(x, geometry), PRODUCT_ERROR)


def test_sums_add_up_over_calls_and_memory_format_does_not_matter() -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=2)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    out = poisoned(2, 18)
    accumulate_conv_(out, x[:2], geometry)
    accumulate_conv_(out, x[2:].contiguous(memory_format=torch.channels_last), geometry)
    torch.testing.assert_close(symmetrise_(out), naive_conv(x, geometry))


@pytest.mark.parametrize("exponent", [-100, -45, 45, 120])
def test_activations_of_any_scale_keep_their_bits(exponent: int) -> None:
    """Squares of 1e-27 are zero in float32, those of 1e27 infinite; a power of two changes no bit of a product."""
    torch.manual_seed(0)
    positions, images, other = torch.randn(CHUNK + 9, 2, 40), torch.randn(3, 64, 31, 31), torch.randn(3, 64, 31, 31)
    geometry = ConvGeometry((3, 3), *SQUARE)
    factor = 2.0**exponent
    outs = []
    for scale in (1.0, factor):
        linear, conv = torch.zeros(2, 40, 40).double(), torch.zeros(1, 576, 576).double()
        cross, crossed = torch.zeros(2, 40, 40).double(), torch.zeros(1, 576, 576).double()
        accumulate_linear_(linear, positions * scale)
        for patches in conv_patches(images * scale, geometry):
            add_products_(conv, patches)
        accumulate_cross_linear_(cross, positions * scale, positions.flip(0) * scale)
        accumulate_cross_conv_(crossed, images * scale, other, geometry)
        outs.append((linear / scale**2, conv / scale**2, cross / scale**2, crossed / scale))
    for plain, scaled in zip(*outs, strict=True):
        assert torch.equal(plain, scaled)
    whole = torch.zeros(1, 576, 576).double()
    accumulate_conv_(whole, images * factor, geometry)
    assert not rows_pay(images * factor, geometry)
    assert_equals(symmetrise_(whole), naive_conv(images * factor, geometry), PRODUCT_ERROR)


def test_no_scale_mends_what_is_not_finite() -> None:
    for bad in (torch.nan, torch.inf):
        x = torch.full((5, 1, NARROW + 1), 1e-30)
        x[2, 0, 3] = bad
        out = torch.zeros(1, NARROW + 1, NARROW + 1).double()
        accumulate_linear_(out, x)
        assert not out[0, 3, 3].isfinite()


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
    assert_equals(symmetrise_(out), naive_linear(x), DOUBLE_ERROR)


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
    x = torch.randn(100, 1, 2 * NARROW)
    out = poisoned(1, 2 * NARROW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulate_linear_(out, x)
    assert_equals(symmetrise_(out), naive_linear(x), PRODUCT_ERROR)


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
