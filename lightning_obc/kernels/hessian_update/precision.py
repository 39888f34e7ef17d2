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
