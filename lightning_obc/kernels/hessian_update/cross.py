"""Accumulation of ``Σ a bᵀ`` over the positions of two inputs of one layer, in float64."""

from __future__ import annotations

from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.hessian_update.conv import conv_patches
from lightning_obc.kernels.hessian_update.geometry import ConvGeometry
from lightning_obc.kernels.hessian_update.linear import CHUNK, NARROW, check_accumulator
from lightning_obc.kernels.hessian_update.precision import as_accumulable, exact_products, in_unit


def accumulate_cross_linear_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``Σ a bᵀ`` to ``out``, all of it.

    Args:
        out: ``[g, d, d]`` float64.
        a: ``[N, g, d]`` positions; float64 is multiplied in float64, all other types in float32.
        b: The same.

    Raises:
        ShapeError: The inputs do not belong to ``out``.
    """
    check_accumulator(out)
    if a.shape != b.shape or a.dim() != 3 or tuple(a.shape[1:]) != tuple(out.shape[:2]):
        raise ShapeError(
            "Two inputs do not fit their accumulator",
            got=f"{tuple(a.shape)} and {tuple(b.shape)}",
            expected=f"twice [N, {out.shape[0]}, {out.shape[1]}]",
        )
    with exact_products(a.device.type):
        for left, right in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
            _add_product_(out, as_accumulable(left), as_accumulable(right))


def accumulate_cross_conv_(out: Tensor, a: Tensor, b: Tensor, geometry: ConvGeometry) -> None:
    """Add ``Σ a bᵀ`` over all patches to ``out``, all of it.

    Args:
        out: ``[g, d, d]`` float64.
        a: ``[N, C, *spatial]``; float64 is multiplied in float64, all other types in float32.
        b: The same.
        geometry: Kernel, stride, dilation, padding and groups.

    Raises:
        ShapeError: The inputs do not belong together or not to ``out``.
    """
    check_accumulator(out)
    if a.shape != b.shape:
        raise ShapeError("Two inputs differ in shape", got=tuple(a.shape), expected=str(tuple(b.shape)))
    with exact_products(a.device.type):
        for left, right in zip(conv_patches(a, geometry), conv_patches(b, geometry), strict=True):
            _add_product_(out, left, right)


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.shape[0] * out.shape[1] <= NARROW:
        a, b = a.double(), b.double()
    (a, first), (b, second) = in_unit(a), in_unit(b)
    product = a.permute(1, 2, 0) @ b.transpose(0, 1)
    for unit in (first, second):
        product = product if unit is None else product.double() * unit
    out.add_(product)
