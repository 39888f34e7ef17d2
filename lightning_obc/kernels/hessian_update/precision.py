"""A local context in which float32 matrix products are float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def ieee_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 passes in float32 matrix products inside; the settings are as before afterwards.

    ``torch.set_float32_matmul_precision("high")`` is common in training scripts and would cost the Hessian its
    small eigenvalues.
    """
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """:func:`ieee_float32`, and no autocast."""
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(ieee_float32())
        yield


def as_accumulable(x: Tensor) -> Tensor:
    """float64 stays float64; everything else (float16, bfloat16, integers) becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


# Products of two numbers between these magnitudes, and sums of 1024 of them, stay normal float32 numbers with room to
# spare: columns that are a millionth of the largest are still resolved.
_LEAST, _MOST = 2.0**-40, 2.0**40


def in_range(x: Tensor) -> bool:
    """Whether float32 products of ``x`` neither underflow nor overflow; waits for the device. True for NaN and Inf,
    which no scale mends."""
    if x.dtype != torch.float32 or not x.numel():
        return True
    low, high = (float(bound) for bound in torch.aminmax(x))
    largest = max(abs(low), abs(high))
    return not (0 < largest < _LEAST or _MOST < largest < float("inf"))


def in_unit(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``x`` times a power of two that makes products of it safe in float32, and what undoes it in a product.

    Scaling by a power of two is exact: where nothing underflows, the products keep their bits. Activations of 1e-27
    occur in networks with random weights; their squares are zero in float32.

    Args:
        x: Any shape, float32 or float64.

    Returns:
        The scaled ``x`` and a float64 scalar on its device, or ``x`` itself and None where no scale is needed. On an
        accelerator there is always one, because looking would wait for the device.
    """
    if x.dtype != torch.float32 or not x.numel() or (x.device.type == "cpu" and in_range(x)):
        return x, None
    # Exponents beyond float32's own: the factor itself has to be a normal number.
    exponent = torch.frexp(torch.linalg.vector_norm(x, float("inf"))).exponent.clamp(-120, 120)
    one = torch.ones((), device=x.device)
    return x * torch.ldexp(one, -exponent), torch.ldexp(one.double(), exponent)
