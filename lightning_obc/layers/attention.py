"""``nn.MultiheadAttention``: the input projections and the output projection."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_obc.kernels.hessian_update import accumulate_cross_linear_, accumulate_linear_, ieee_float32, symmetrise_
from lightning_obc.layers.base import ProblemShape
from lightning_obc.layers.linear import OneProduct
from lightning_obc.layers.parts import LayerPart, PartAdapter

_INPUTS = ("query", "key", "value")


def attention_parts(module: nn.Module) -> dict[str, LayerPart]:
    """``in_proj`` (packed), or ``q_proj``, ``k_proj`` and ``v_proj``; then ``out_proj``."""
    parts: dict[str, LayerPart] = {}
    if getattr(module, "in_proj_weight", None) is not None:
        parts["in_proj"] = LayerPart(module, "in_proj_weight", PackedProjectionAdapter())
    else:
        for name in _INPUTS:
            parts[f"{name[0]}_proj"] = LayerPart(module, f"{name[0]}_proj_weight", ProjectionAdapter(name))
    parts["out_proj"] = LayerPart(module, "out_proj.weight", OutputProjectionAdapter())
    return parts


def _batch_first(module: Any, x: Tensor) -> Tensor:
    """``[N, L, E]`` of what the attention is called with."""
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = dict(zip(_INPUTS, args, strict=False)) | kwargs
    return [given[name] for name in _INPUTS]


class ProjectionAdapter(OneProduct, PartAdapter):
    """One projection with a weight of its own.

    Args:
        name: The argument of the attention's forward that it projects.
    """

    def __init__(self, name: str) -> None:
        self._index = _INPUTS.index(name)

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return _batch_first(self.owner(module), x)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.normalise_inputs(module, _arguments(args, kwargs)[self._index].detach())


class OutputProjectionAdapter(ProjectionAdapter):
    """The output projection. What it receives is what the attention returns with the identity in its place."""

    def __init__(self) -> None:
        super().__init__("query")

    @torch.no_grad()
    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        twin: Any = copy.copy(self.owner(module))
        weight = twin.out_proj.weight
        identity = nn.Module()
        identity.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device), False)
        identity.register_parameter("bias", None)
        twin.__dict__["_modules"] = {"out_proj": identity}
        with ieee_float32():
            output, _ = twin.forward(*args, **kwargs)
        return self.normalise_inputs(module, output)


class PackedProjectionAdapter(PartAdapter):
    """The packed input projection ``[3E, E]``: three problems, of query, key and value, each with its own Hessian."""

    def shape(self, module: nn.Module) -> ProblemShape:
        rows, columns = self.current(module).shape
        return ProblemShape(groups=3, rows=rows // 3, columns=columns, channels=columns)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.reshape(3, -1, tensor.shape[-1])

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, matrix.shape[-1])

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return _batch_first(self.owner(module), x)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``[N, L, 3, E]``, or ``[N, L, 1, E]`` when query, key and value are one tensor.

        Shorter sequences are filled with zeros, which add nothing to the sums.
        """
        tensors = _arguments(args, kwargs)
        if all(x is tensors[0] for x in tensors):
            tensors = tensors[:1]
        tensors = [self.normalise_inputs(module, x.detach()) for x in tensors]
        length = max(x.shape[1] for x in tensors)
        return torch.stack([F.pad(x, (0, 0, 0, length - x.shape[1])) for x in tensors], dim=2)

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        if x.shape[-2] == 3:
            accumulate_linear_(out, x.flatten(0, -3))
            return
        product = out.new_zeros(1, *out.shape[1:])
        accumulate_linear_(product, x.flatten(0, -3))
        out.add_(symmetrise_(product))

    def accumulate_cross_(self, module: nn.Module, out: Tensor, a: Tensor, b: Tensor) -> None:
        target = out if a.shape[-2] == 3 else out.new_zeros(1, *out.shape[1:])
        accumulate_cross_linear_(target, a.flatten(0, -3), b.flatten(0, -3))
        if target is not out:
            out.add_(target)
