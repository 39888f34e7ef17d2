"""Weights that ``torch.nn.utils.parametrize`` computes from other tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_obc.errors import UnsupportedLayerError


def reason_not_invertible(module: nn.Module) -> str | None:
    """Why a parametrized weight cannot be assigned to, or None."""
    parametrizations: Any = module.parametrizations
    for step in parametrizations.weight:
        if not hasattr(step, "right_inverse"):
            return f"its parametrization {type(step).__name__} has no right_inverse"
    return None


def write_parametrized_(module: Any, value: Tensor) -> None:
    """Assign a parametrized weight, and check that what the module then computes is that weight.

    Zeros must come back as zeros, everything else up to rounding.

    Raises:
        UnsupportedLayerError: The parametrization cannot hold the weight; the module is as it was before.
    """
    assert is_parametrized(module, "weight")
    originals = [
        (tensor, tensor.detach().clone()) for tensor in module.parametrizations.weight.parameters(recurse=False)
    ]
    value = value.to(module.weight.device, module.weight.dtype)
    with torch.no_grad():
        module.weight = value
        written = module.weight
    tolerance = 8 * torch.finfo(value.dtype).eps * value.abs().amax()
    if bool(((written - value).abs() <= tolerance).all()) and bool((written[value == 0] == 0).all()):
        return
    with torch.no_grad():
        for tensor, before in originals:
            tensor.copy_(before)
    raise UnsupportedLayerError(
        f"The parametrization of a {type(module).__name__} cannot hold the compressed weight",
        got=", ".join(type(step).__name__ for step in module.parametrizations.weight),
        expected="a parametrization that returns any weight it is given",
        remedy="call torch.nn.utils.parametrize.remove_parametrizations before compressing, or exclude the layer",
    )
