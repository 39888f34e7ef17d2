"""Two operators that mean the same in PyTorch and in ONNX: a weight from its codes, and a quantized activation.

They exist because PyTorch's own fake-quantize operators do not survive export: these carry the integer codes through
:func:`torch.export.export`, and become ``DequantizeLinear`` and ``QuantizeLinear`` nodes with exactly those integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_obc.brief import Brief

NAMESPACE = "lightning_obc"


@dataclass(frozen=True, repr=False)
class StoredCodes(Brief):
    """Signed codes in the layout of the module, with scales in the form that ONNX's ``DequantizeLinear`` takes.

    Attributes:
        codes: int8, shape of the module's weight: unsigned code minus ``2**(bits - 1)``.
        scale: ``[]``, ``[n]`` along ``axis``, or the shape of ``codes`` with ``axis`` divided by ``block``.
        zero_point: int8, shape of ``scale``, shifted as the codes are.
        axis: Dimension along which scales change.
        block: Run of entries along ``axis`` that share a scale; 0 for one scale per index (or one at all).
        bits: Bit width of the codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    block: int
    bits: int


def spread(tensor: Tensor, shape: torch.Size | tuple[int, ...], axis: int, block: int) -> Tensor:
    """Scales or zero points in ONNX's form, spread to the shape of the codes (broadcastable when ``block`` is 0)."""
    if block:
        return tensor.repeat_interleave(block, dim=axis)
    return tensor if tensor.dim() == 0 else tensor.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def compact_scales(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """The smallest ``(scale, zero_point, axis, block)`` that spreads to given full-shape tensors.

    Both tensors have the shape of the module's weight. The forms tried are one number, one per index of a dimension,
    and runs along one dimension, which covers every grid and every layout of a layer without asking what it is.
    """
    if _constant(scale) and _constant(zero_point):
        return scale.flatten()[0], zero_point.flatten()[0], 0, 0
    for axis in range(scale.dim()):
        first = scale.movedim(axis, 0).flatten(1)
        zero = zero_point.movedim(axis, 0).flatten(1)
        if bool((first == first[:, :1]).all()) and bool((zero == zero[:, :1]).all()):
            return first[:, 0].contiguous(), zero[:, 0].contiguous(), axis, 0
    axis, block = min(_runs(scale, zero_point), key=lambda run: (scale.numel() // run[1], run[0]))
    keep = torch.arange(0, scale.shape[axis], block, device=scale.device)
    return scale.index_select(axis, keep), zero_point.index_select(axis, keep), axis, block


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _runs(scale: Tensor, zero_point: Tensor) -> list[tuple[int, int]]:
    """For every dimension the longest run of equal scales that divides it."""
    runs = []
    for axis, size in enumerate(scale.shape):
        if size == 1:
            continue
        change = torch.zeros(size - 1, dtype=torch.bool, device=scale.device)
        for tensor in (scale, zero_point):
            moved = tensor.movedim(axis, 0).flatten(1)
            change |= (moved[1:] != moved[:-1]).any(1)
        block = size
        for index in torch.nonzero(change).flatten().tolist():
            block = math.gcd(block, index + 1)
        runs.append((axis, block))
    return runs


@lru_cache(maxsize=1)
def operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Register the operators once and return ``(dequantize_weight, quantize_dequantize)``."""

    @torch.library.custom_op(f"{NAMESPACE}::dequantize_weight", mutates_args=())
    def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
        zero = spread(zero_point.to(scale.dtype), codes.shape, axis, block)
        return (codes.to(scale.dtype) - zero) * spread(scale, codes.shape, axis, block) + 0.0

    @dequantize_weight.register_fake
    def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
        return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)

    @torch.library.custom_op(f"{NAMESPACE}::quantize_dequantize", mutates_args=())
    def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, max_code: int) -> Tensor:
        zero = zero_point.to(scale.dtype)
        return (torch.clamp(torch.round(x / scale) + zero, 0, max_code) - zero) * scale

    @quantize_dequantize.register_fake
    def _(x: Tensor, scale: Tensor, zero_point: Tensor, max_code: int) -> Tensor:
        return torch.empty_like(x)

    library = getattr(torch.ops, NAMESPACE)
    return library.dequantize_weight.default, library.quantize_dequantize.default


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the operators become in ONNX (opset 21), for ``torch.onnx.export``."""
    from lightning_obc.files import require

    onnx = require("onnx", "onnx")
    op = require("onnxscript", "onnx").opset21
    weight, activation = operators()

    def dequantize_weight(codes: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis, block_size=block)

    def quantize_dequantize(x: Any, scale: Any, zero_point: Any, max_code: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero_point)
        if max_code < 255:
            codes = op.Min(
                codes, op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.UINT8, [], [max_code]))
            )
        return op.DequantizeLinear(codes, scale, zero_point)

    return {weight: dequantize_weight, activation: quantize_dequantize}
