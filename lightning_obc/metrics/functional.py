"""Figures of a compressed model as plain functions; the classes beside this file accumulate the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_obc.errors import LayerNotFoundError, ShapeError

if TYPE_CHECKING:
    from lightning_obc.metrics.storage import Storage

DENSE_BITS = 32


def whole(weight: Tensor) -> Tensor:
    """The full tensor behind a sharded one (``DTensor``), so that counts are those of the whole weight."""
    gather = getattr(weight, "full_tensor", None)
    return weight.detach() if gather is None else gather().detach()


def count_zeros(weight: Tensor) -> Tensor:
    """``[2]`` float64: zeros and entries of a weight of any shape."""
    weight = whole(weight)
    zeros = (weight == 0).sum().to("cpu", torch.float64)
    return torch.stack([zeros, torch.tensor(float(weight.numel()), dtype=torch.float64)])


def sparsity(weights: Mapping[str, Tensor]) -> Tensor:
    """Fraction of zeros in all the weights together, 0-d float64.

    >>> sparsity({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 0.0])})
    tensor(0.7500, dtype=torch.float64)
    """
    counts = torch.zeros(2, dtype=torch.float64)
    for weight in weights.values():
        counts += count_zeros(weight)
    return counts[0] / counts[1].clamp(min=1)


def layer_sparsity(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fraction of zeros in each weight, 0-d float64 by name."""
    return {name: sparsity({name: weight}) for name, weight in weights.items()}


def average_bits(weights: Mapping[str, Tensor], storage: Mapping[str, Storage]) -> Tensor:
    """Mean bit width over all the entries of the weights, 0-d float64; zeros count with their layer's width.

    Args:
        weights: The weights to average over.
        storage: How some of them are stored; the others have 32 bits.

    Raises:
        LayerNotFoundError: ``storage`` names a weight that is not there.
    """
    _check_names(weights, storage)
    counts = torch.zeros(2, dtype=torch.float64)
    for name, weight in weights.items():
        bits = storage[name].bits if name in storage else DENSE_BITS
        counts += torch.tensor([float(bits * weight.numel()), float(weight.numel())], dtype=torch.float64)
    return counts[0] / counts[1].clamp(min=1)


def stored_bytes(parameters: Mapping[str, Tensor], storage: Mapping[str, Storage]) -> Tensor:
    """``[2]`` float64: bytes of the dense and of the compressed model (:mod:`lightning_obc.metrics.storage`).

    Args:
        parameters: Every parameter of the model, tied ones once.
        storage: How the compressed ones are stored, by parameter name.

    Raises:
        LayerNotFoundError: ``storage`` names a parameter that is not there.
    """
    _check_names(parameters, storage)
    counts = torch.zeros(2, dtype=torch.float64)
    for name, parameter in parameters.items():
        dense = parameter.numel() * DENSE_BITS / 8
        size = storage[name].size(whole(parameter)) if name in storage else dense
        counts += torch.tensor([dense, size], dtype=torch.float64)
    return counts


def compression_ratio(parameters: Mapping[str, Tensor], storage: Mapping[str, Storage]) -> Tensor:
    """Dense float32 bytes of all the parameters over their compressed bytes, 0-d float64.

    The convention of both sides is that of :mod:`lightning_obc.metrics.storage`.
    """
    dense, compressed = stored_bytes(parameters, storage)
    return dense / compressed if compressed > 0 else torch.ones((), dtype=torch.float64)


def squared_errors(compressed: Tensor, dense: Tensor) -> Tensor:
    """``[2]`` float64: ``‖compressed − dense‖²`` and ``‖dense‖²`` of two outputs of the same shape.

    Raises:
        ShapeError: The shapes differ.
    """
    if compressed.shape != dense.shape:
        raise ShapeError(
            "Outputs of a compressed and a dense layer have different shapes",
            got=f"{tuple(compressed.shape)} and {tuple(dense.shape)}",
            expected="the same shape, from the same input",
        )
    reference = dense.detach().double()
    error = (compressed.detach().double() - reference).square().sum()
    return torch.stack([error, reference.square().sum()]).cpu()


def relative_error(compressed: Tensor, dense: Tensor) -> Tensor:
    """Squared error of a layer's output relative to the dense output, 0-d float64.

    >>> relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
    tensor(0.2000, dtype=torch.float64)
    """
    error, reference = squared_errors(compressed, dense)
    return error / reference if error > 0 else error


def _check_names(weights: Mapping[str, Tensor], storage: Mapping[str, Storage]) -> None:
    unknown = sorted(set(storage) - set(weights))
    if unknown:
        raise LayerNotFoundError(
            "A storage is given for weights that are not there",
            got=", ".join(unknown),
            expected=f"names among {', '.join(weights)}",
        )
