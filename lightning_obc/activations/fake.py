"""Fake quantization of a tensor, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FakeQuantize(torch.autograd.Function):
    """Grid points forward; backward the gradient of clipping alone (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, max_code: int) -> Tensor:
        shifted = torch.round(x / scale) + zero_point
        ctx.save_for_backward((shifted >= 0) & (shifted <= max_code))
        return (shifted.clamp(0, max_code) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, max_code: int, axis: int | None = None) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, 0, max_code) - zero_point) · scale``; halves round to even.

    Args:
        x: Any shape, floating point; narrower types than float32 are computed in float32.
        scale: ``[C]`` positive, ``C`` being 1 or the size of ``axis``.
        zero_point: ``[C]`` integers in ``0 .. max_code``, floating point.
        max_code: Largest code.
        axis: Dimension of ``x`` that ``C`` runs along; None for one scale.

    Returns:
        The dtype and device of ``x``. Its gradient passes straight through where ``x`` lies within the range.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    scale, zero_point = (part.to(wide).reshape(shape) for part in (scale, zero_point))
    return _FakeQuantize.apply(wide, scale, zero_point, max_code).to(x.dtype)
