"""Weights that ``torch.nn.utils.parametrize`` computes from other tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from lightning_obc.errors import UnsupportedLayerError

# By list of parametrizations: why they cannot hold every weight, or None. Trying it costs a few passes through them.
_TRIED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def reason_not_invertible(module: nn.Module) -> str | None:
    """Why a parametrized weight cannot be set to any value, or None. Tried on a copy, once for every module."""
    steps: Any = module.parametrizations
    if steps.weight not in _TRIED:
        _TRIED[steps.weight] = _tried(steps.weight)
    return _TRIED[steps.weight]


@torch.no_grad()
def _tried(steps: Any) -> str | None:
    for step in steps:
        if not hasattr(step, "right_inverse"):
            return f"its parametrization {type(step).__name__} has no right_inverse"
    names = ", ".join(type(step).__name__ for step in steps)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        copied = copy.deepcopy(steps).eval()
        now, generator = copied(), torch.Generator().manual_seed(0)
        value = torch.randn(now.shape, generator=generator).to(now) * now.std().nan_to_num(0).clamp(min=1e-3)
        value.masked_fill_((torch.rand(now.shape, generator=generator) < 0.5).to(now.device), 0)
        try:
            holds = _holds(_assigned(copied, value), value)
        except Exception:
            # Parametrizations check what they are given in their own ways.
            holds = False
    return None if holds else f"its parametrization {names} cannot hold a compressed weight"


@contextmanager
def _evaluating(steps: nn.Module) -> Iterator[None]:
    """In training, spectral normalisation goes on with its power iteration whenever the weight is read."""
    modules = list(steps.modules())
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def parametrized_value(module: Any) -> Tensor:
    """The weight as the module computes it in evaluation mode."""
    with _evaluating(module.parametrizations.weight):
        return module.weight  # type: ignore[no-any-return]


@torch.no_grad()
def _assigned(steps: Any, value: Tensor) -> Tensor:
    """Set the weight, and return what is computed then."""
    # PyTorch lets the parameters share the memory of what they are set to.
    steps.right_inverse(value.clone(memory_format=torch.contiguous_format))
    if len(steps) == 1 and isinstance(steps[0], parametrizations._WeightNorm):
        # A slice of zeros has no direction, and 0 / 0 would be computed of it. Any direction does, at length 0.
        length, direction = steps.original0, steps.original1
        direction.masked_fill_((length == 0).expand_as(direction), 1.0)
    return steps()  # type: ignore[no-any-return]


def _holds(written: Tensor, value: Tensor) -> bool:
    """Zeros are zeros, everything else is the same up to rounding."""
    tolerance = 8 * torch.finfo(value.dtype).eps * value.abs().amax()
    return bool(((written - value).abs() <= tolerance).all()) and bool((written[value == 0] == 0).all())


@torch.no_grad()
def write_parametrized_(module: Any, value: Tensor) -> None:
    """Assign a parametrized weight, and check that what the module then computes is that weight.

    Zeros must come back as zeros, everything else up to rounding. A weight that is there already is not written.

    Raises:
        UnsupportedLayerError: The parametrization cannot hold the weight; the module is as it was before.
    """
    assert is_parametrized(module, "weight")
    steps = module.parametrizations.weight
    now = parametrized_value(module)
    value = value.to(now.device, now.dtype)
    if torch.equal(now, value):
        return
    before = {name: tensor.clone() for name, tensor in steps.state_dict().items()}
    holds = False
    try:
        with torch.inference_mode(False), _evaluating(steps):
            holds = _holds(_assigned(steps, value), value)
    finally:
        if not holds:
            for name, tensor in steps.state_dict().items():
                tensor.copy_(before[name])
    if not holds:
        raise UnsupportedLayerError(
            f"The parametrization of a {type(module).__name__} cannot hold the compressed weight",
            got=", ".join(type(step).__name__ for step in steps),
            expected="a parametrization that returns any weight it is given",
            remedy="call torch.nn.utils.parametrize.remove_parametrizations before compressing, or exclude the layer",
        )
