"""``Σ x xᵀ`` of plain positions, for one or many problems at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.hessian_update.precision import as_accumulable, exact_products, in_unit
from lightning_obc.kernels.hessian_update.sampling import drawn_positions

# Positions in one float32 product. Its rounding error grows with the number of positions, float64's does not.
CHUNK = 1024
# Width of the column strips of one product: only what lies right of a strip's start is multiplied, which saves
# nearly half of the work of a wide layer; narrower strips lose more in the products than they save.
STRIP = 256
# Up to this many columns (of all groups together) a product in float64 costs no more than the call around it: 7 to
# 37 µs for 1024 positions of 7 to 32 columns, float32 9 to 18 µs. Such products do not depend on the order in which a
# processor's matrix kernels add.
NARROW = 32


def accumulate_linear_(out: Tensor, x: Tensor) -> None:
    """Add ``Σ x xᵀ`` to the upper triangle of ``out``.

    What lies below the diagonal of ``out`` is unspecified until :func:`symmetrise_`.

    Args:
        out: ``[g, d, d]`` float64.
        x: ``[N, g, d]`` positions; float64 is multiplied in float64, all other types in float32.

    Raises:
        ShapeError: ``x`` does not belong to ``out``.
    """
    check_accumulator(out)
    if x.dim() != 3 or tuple(x.shape[1:]) != tuple(out.shape[:2]):
        raise ShapeError(
            "Positions do not fit their accumulator",
            got=tuple(x.shape),
            expected=f"[N, {out.shape[0]}, {out.shape[1]}]",
        )
    drawn = drawn_positions(len(x))
    with exact_products(x.device.type):
        if drawn is None:
            for chunk in x.split(CHUNK):
                add_products_(out, as_accumulable(chunk))
        else:
            index, scale = drawn
            for chosen in index.to(x.device).split(CHUNK):
                add_products_(out, as_accumulable(x[chosen]) * scale)


def check_accumulator(out: Tensor) -> None:
    if out.dim() != 3 or out.shape[1] != out.shape[2] or out.dtype != torch.float64:
        raise ShapeError(
            "An accumulator has the wrong shape or dtype",
            got=f"{tuple(out.shape)} {out.dtype}",
            expected="[g, d, d] float64",
        )


def add_products_(out: Tensor, x: Tensor) -> None:
    """One product of ``[n, g, d]`` positions, upper strips only: in the dtype of ``x``, narrow ones in float64."""
    groups, columns = out.shape[:2]
    x, unit = (x.double(), None) if groups * columns <= NARROW else in_unit(x)
    if groups == 1:
        flat, upper = x[:, 0], out[0]
        for start in range(0, columns, STRIP):
            stop = min(start + STRIP, columns)
            upper[start:stop, start:].add_(squared(flat[:, start:stop].T @ flat[:, start:], unit))
    else:
        by_group = x.transpose(0, 1)
        for start in range(0, columns, STRIP):
            stop = min(start + STRIP, columns)
            product = by_group[..., start:stop].transpose(1, 2) @ by_group[..., start:]
            out[:, start:stop, start:].add_(squared(product, unit))


def squared(product: Tensor, unit: Tensor | None) -> Tensor:
    """A product of inputs in ``unit``, in float64 and back in its own scale."""
    return product if unit is None else product.double() * unit.square()


def symmetrise_(out: Tensor) -> Tensor:
    """Copy the upper triangle of ``[..., d, d]`` onto the lower one, in place; returns ``out``."""
    columns = out.shape[-1]
    for start in range(0, columns, STRIP):
        stop = min(start + STRIP, columns)
        block = out[..., start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
        out[..., stop:, start:stop] = out[..., start:stop, stop:].mT
    return out
