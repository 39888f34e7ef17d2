"""Smaller tensors in the place of larger ones: a model's parameters and buffers, its sizes, masks, codes and grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_obc.activations import InputGrid, attach, attached
from lightning_obc.errors import FingerprintError
from lightning_obc.export.weights import CompressedWeight, layer_adapter, named_layers
from lightning_obc.grids import Grid

Keep = Union[Tensor, None]
Sizes = Mapping[str, Mapping[str, int]]


@dataclass
class Slices:
    """Indices that stay, by tensor and dimension; None where all do.

    Attributes:
        kept: By ``id`` of a parameter or buffer of the original model: int64 indices for each dimension.
    """

    kept: dict[int, list[Keep]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> list[Keep] | None:
        return self.kept.get(id(tensor))

    def take(self, like: Tensor, tensor: Tensor) -> Tensor:
        """A tensor in the shape of ``like``, an entry of the original model, without what goes."""
        for dim, indices in enumerate(self.of(like) or []):
            if indices is not None:
                tensor = tensor.index_select(dim, indices.to(tensor.device))
        return tensor


def states(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and buffers, and the dictionaries that hold them."""
    for holder in (module._parameters, module._buffers):
        for name, value in holder.items():
            if value is not None:
                yield holder, name, value


def slice_(small: nn.Module, model: nn.Module, slices: Slices) -> dict[str, dict[str, int]]:
    """Cut a copy of a model in place; tied tensors stay tied.

    Returns:
        The sizes that its modules have now, where these are attributes.
    """
    done: dict[int, Tensor] = {}
    sizes: dict[str, dict[str, int]] = {}
    originals = dict(model.named_modules())
    for name, module in small.named_modules():
        for (holder, key, old), (_, _, original) in zip(states(module), states(originals[name]), strict=True):
            if slices.of(original) is not None:
                if id(original) not in done:
                    done[id(original)] = _replacement(old, slices.take(original, old.detach()).clone())
                holder[key] = done[id(original)]
        if changed := _own_sizes(module):
            set_sizes_(module, changed)
            sizes[name] = changed
    return sizes


def _replacement(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _own_sizes(module: nn.Module) -> dict[str, int]:
    """What the attributes of a module of PyTorch must be for its tensors, where they are something else."""
    found: dict[str, Any] = {}
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        found = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    elif isinstance(module, _ConvNd):
        rows, columns = module.weight.shape[:2]
        if module.groups > 1:
            found = {"groups": rows // (module.out_channels // module.groups)}
            found |= {"out_channels": rows, "in_channels": columns * found["groups"]}
        else:
            found = {"out_channels": rows, "in_channels": columns}
            if module.transposed:
                found = {"out_channels": columns, "in_channels": rows}
    elif isinstance(module, _NormBase):
        tensor = weight if weight is not None else module.running_mean
        found = {} if tensor is None else {"num_features": len(tensor)}
    elif isinstance(module, nn.Embedding):
        found = {"embedding_dim": module.weight.shape[1]}
    return {key: int(value) for key, value in found.items() if getattr(module, key) != value}


def set_sizes_(module: nn.Module, sizes: Mapping[str, int]) -> None:
    for key, value in sizes.items():
        setattr(module, key, value)


def carried(
    model: nn.Module, small: nn.Module, slices: Slices, state: Mapping[str, CompressedWeight]
) -> dict[str, CompressedWeight]:
    """Masks, codes and grids of what is left; every code, scale and zero point is one that was there."""
    modules, smaller = named_layers(model), named_layers(small)
    result: dict[str, CompressedWeight] = {}
    for name, weight in state.items():
        module, adapter = layer_adapter(name, modules)
        original = adapter.current(module)
        if slices.of(original) is None:
            result[name] = weight
            continue

        def move(matrix: Tensor, module: Any = module, original: Tensor = original, name: str = name) -> Tensor:
            _, adapter = layer_adapter(name, modules)
            cut = slices.take(original, adapter.to_module_layout(module, matrix))
            return adapter.to_matrix_layout(smaller[name], cut).clone(memory_format=torch.contiguous_format)

        result[name] = _moved(weight, move)
    return result


def _moved(weight: CompressedWeight, move: Callable[[Tensor], Tensor]) -> CompressedWeight:
    if weight.codes is None or weight.scale is None or weight.zero_point is None:
        return CompressedWeight(move(weight.mask))
    groups = move(weight.expand(group_numbers(weight)))
    changes = torch.nonzero(groups[0, 0, 1:] != groups[0, 0, :-1]).flatten() + 1
    # Runs of this length never leave one of the old groups.
    run = math.gcd(groups.shape[-1], *changes.tolist())
    scale, zero = (move(weight.expand(part))[..., ::run].contiguous() for part in (weight.scale, weight.zero_point))
    return CompressedWeight(move(weight.mask), move(weight.codes), scale, zero, weight.bits, weight.symmetric)


def group_numbers(weight: CompressedWeight) -> Tensor:
    """``[g, R, C]``: the number of each column group."""
    assert weight.scale is not None
    return torch.arange(weight.scale.shape[-1]).expand(weight.scale.shape)


def carry_inputs_(small: nn.Module, model: nn.Module, slices: Slices) -> None:
    """Ranges of quantized inputs with one entry per channel lose the channels that their layer no longer reads."""
    modules = dict(model.named_modules())
    changed: dict[str, InputGrid] = {}
    for name, inputs in attached(small).items():
        module: Any = modules[name]
        kept = slices.of(module.weight) if isinstance(getattr(module, "weight", None), Tensor) else None
        if inputs.axis is None or kept is None:
            continue
        first = getattr(module, "groups", 1) > 1 or getattr(module, "transposed", False)
        indices = kept[0 if first else 1]
        if indices is not None:
            grid = inputs.grid
            scale, zero = (part.index_select(1, indices.to(part.device)) for part in (grid.scale, grid.zero_point))
            changed[name] = InputGrid(inputs.spec, Grid(grid.spec, scale, zero), inputs.axis)
    attach(small, changed)


def resize_(model: nn.Module, shapes: Mapping[str, Any], sizes: Sizes) -> Callable[[], None]:
    """Give a model the sizes of a smaller one, in place; entries that change shape are zero until they are loaded.

    Args:
        model: Of the same modules, with larger tensors.
        shapes: Dtype and shape by state-dict key.
        sizes: Attributes by module (:attr:`Shrunk.sizes`).

    Returns:
        A function that puts the old sizes back.

    Raises:
        FingerprintError: A module or an attribute is not there. Nothing is changed then.
    """
    modules = dict(model.named_modules())
    absent = [f"{name}.{key}" for name, keys in sizes.items() for key in keys if not hasattr(modules.get(name), key)]
    if absent:
        raise FingerprintError(
            "Sizes belong to another model", got=f"no {', '.join(absent[:4])}", expected="the model that was shrunk"
        )
    undo: list[Callable[[], None]] = []
    done: dict[int, Tensor] = {}
    for name, module in modules.items():
        old = {key: getattr(module, key) for key in sizes.get(name, {})}
        undo.append(lambda module=module, old=old: set_sizes_(module, old))  # type: ignore[misc]
        set_sizes_(module, sizes.get(name, {}))
        for holder, key, value in list(states(module)):
            shape = shapes.get(f"{name}.{key}" if name else key, [None, list(value.shape)])[1]
            if list(value.shape) != list(shape) and len(shape) == value.dim():
                undo.append(lambda holder=holder, key=key, value=value: holder.__setitem__(key, value))  # type: ignore[misc]
                if id(value) not in done:
                    done[id(value)] = _replacement(value, value.new_zeros(tuple(shape)))
                holder[key] = done[id(value)]

    def back() -> None:
        for step in undo:
            step()

    return back
