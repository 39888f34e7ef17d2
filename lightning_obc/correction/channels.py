"""Outputs seen by channel: where they can be observed, where channels lie, and what scales and shifts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_obc.correction.norms import is_norm
from lightning_obc.correction.passes import first_tensor
from lightning_obc.layers import adapter_for
from lightning_obc.layers.linear import LinearAdapter
from lightning_obc.layers.parts import LayerPart

_SECOND_AXIS = (_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward, nn.GroupNorm.forward)
_LAST_AXES = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def observed(module: nn.Module) -> nn.Module | None:
    """The module whose output is that of the layer; None for weights inside a module (gates, input projections)."""
    if not isinstance(module, LayerPart):
        return module
    return module.owner if _is_output_projection(module) else None


def affine(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer, parameters or buffers, None where it has none. Of norm layers: scale and shift."""
    if isinstance(module, LayerPart):
        out: Any = module.owner.out_proj if _is_output_projection(module) else None
        return module.weight, None if out is None else out.bias
    return _own(module, "weight"), _own(module, "bias")


def has_bias(module: nn.Module) -> bool:
    """True for layers whose outputs can be shifted."""
    return affine(module)[1] is not None


def _own(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer; what a parametrization or hook computes anew cannot be changed in place."""
    own = module._parameters.get(name)
    return own if own is not None else module._buffers.get(name)


def _is_output_projection(part: LayerPart) -> bool:
    return isinstance(part.owner, nn.MultiheadAttention) and part.parameter == "out_proj.weight"


def channels_by_values(module: nn.Module, output: Tensor, args: tuple[Any, ...]) -> Tensor | None:
    """The output of a norm or weight-carrying layer as ``[channels, values]``, None when it is not known how.

    Channels are the entries of the layer's bias: for a layer-norm over several axes each of its elements is one.
    """
    forward = type(module).forward
    if isinstance(module, nn.modules.conv._ConvNd):
        return output.movedim(output.dim() - len(module.kernel_size) - 1, 0).flatten(1)
    if isinstance(module, nn.MultiheadAttention) or isinstance(adapter_for(module), LinearAdapter):
        return output.flatten(0, -2).T if output.dim() > 1 else output.unsqueeze(1)
    if forward in _SECOND_AXIS:
        return output.movedim(1, 0).flatten(1)
    if forward in _LAST_AXES:
        axes: Any = module.normalized_shape
        return output.flatten(output.dim() - len(axes)).flatten(0, -2).T
    axis = _probed_axis(module, args) if is_norm(module) else None
    return None if axis is None else output.movedim(axis, 0).flatten(1)


@torch.no_grad()
def _probed_axis(module: nn.Module, args: tuple[Any, ...]) -> int | None:
    """Channel axis of a norm layer with a forward of its own, found by running it with a scale of zero.

    Its output must then be its bias, repeated along all other axes. Where it is anything else (an activation inside, a
    scale of ``1 + weight``), folding a correction into the parameters would be wrong, and None is returned.
    """
    weight, bias = affine(module)
    if weight is None:
        return None
    size = weight.numel()
    ramp = torch.arange(size, device=weight.device).sub(size // 2).to(weight.dtype)
    substitute = {"weight": torch.zeros_like(weight)} | ({} if bias is None else {"bias": ramp.view_as(bias)})
    probe = first_tensor(functional_call(module, substitute, args))
    if probe is None:
        return None
    fitting = [axis for axis in range(1, probe.dim()) if probe.shape[axis] == size]
    if bias is None:
        return fitting[-1] if fitting and not bool(probe.any()) else None
    for axis in fitting:
        shape = [size if index == axis else 1 for index in range(probe.dim())]
        if torch.equal(probe, ramp.to(probe.dtype).view(shape).expand_as(probe)):
            return axis
    return None
