"""Elementwise work beside the compiled kernels, on NumPy where the tensors are on the host.

After a parallel torch operation the threads of its OpenMP pool go on spinning for milliseconds. On a machine whose
cores all work for a compiled kernel they take their time from it, so that a check of a matrix can cost more than its
elimination.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """True when a tensor holds neither NaN nor Inf."""
    if tensor.device.type != "cpu":
        return bool(torch.isfinite(tensor).all())
    array = tensor.detach().numpy()
    with np.errstate(invalid="ignore"):
        # Both are NaN where one element is. No temporary as large as the tensor.
        return array.size == 0 or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def all_positive(tensor: Tensor) -> bool:
    """True when every element of a finite tensor is above 0."""
    if tensor.device.type != "cpu":
        return bool((tensor > 0).all())
    array = tensor.detach().numpy()
    return array.size == 0 or bool(array.min() > 0)


def zero_outside(tensor: Tensor, keep: Tensor) -> bool:
    """True when a tensor is 0 wherever ``keep``, of its shape, is False."""
    if tensor.device.type != "cpu":
        return not bool((tensor.masked_fill(keep, 0) != 0).any())
    return not np.any(tensor.detach().numpy()[~keep.numpy()])


def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`torch.full`."""
    if device.type != "cpu":
        return torch.full(shape, value, dtype=dtype, device=device)
    return torch.from_numpy(np.full(shape, value, numpy_type(dtype)))


def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """NumPy's name of a type that it has too."""
    return np.dtype(str(dtype).removeprefix("torch."))


def flat_rows(tensor: Tensor) -> NDArray[Any]:
    """``[…, d]`` on the host as ``[P, d]``, without a copy where the tensor is contiguous."""
    array = np.ascontiguousarray(tensor.detach().numpy())
    return array.reshape(-1, tensor.shape[-1])


def flat_double_rows(tensor: Tensor) -> NDArray[np.float64]:
    """A float64 copy of :func:`flat_rows`, of any floating type."""
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.double()  # NumPy has no such type
    return flat_rows(tensor).astype(np.float64)


def symmetric(matrix: Tensor) -> NDArray[Any]:
    """``[g, d, d]`` on the host, symmetric, in rows or in columns, which are the same: a copy only where it is neither.

    LAPACK returns its results in columns, and turning them around takes longer than some sweeps' checks and setup.
    """
    array = matrix.detach().numpy()
    turned = array.transpose(0, 2, 1)
    return turned if turned.flags.c_contiguous else np.ascontiguousarray(array)
