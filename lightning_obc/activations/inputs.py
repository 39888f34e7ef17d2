"""Quantized layer inputs of a model: attached, found again, taken off, and written as plain state.

The hooks are all there is. They carry their grids, so that copies and pickles of a model stay quantized; its keys and
its ``forward`` stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lightning_obc.activation_spec import ActivationGrid
from lightning_obc.activations.fake import fake_quantize
from lightning_obc.brief import Brief
from lightning_obc.errors import FingerprintError
from lightning_obc.grids import Grid
from lightning_obc.layers import normalise_name, select_layers
from lightning_obc.specs import IntGrid


@dataclass(frozen=True, repr=False)
class InputGrid(Brief):
    """How one layer's input is quantized.

    Attributes:
        spec: What the range was found by; its ``bits`` are those of the grid.
        grid: ``scale`` and ``zero_point`` ``[1, C, 1]``, zero points within ``0 .. max_code``.
        axis: Dimension of the input, counted from the end, that ``C`` runs along; None for one range.
    """

    spec: ActivationGrid
    grid: Grid
    axis: int | None = None


class InputQuantization:
    """A forward pre-hook that quantizes the first tensor of a layer's inputs.

    A class and not a closure, so that models with it can be pickled.
    """

    def __init__(self, inputs: InputGrid) -> None:
        self.inputs = inputs
        self.active = True
        self._scale, self._zero_point = inputs.grid.scale.flatten(), inputs.grid.zero_point.flatten()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_tensor(args, kwargs)
        if x is None or not self.active:
            return args, kwargs
        if self._scale.device != x.device:
            self._scale, self._zero_point = self._scale.to(x.device), self._zero_point.to(x.device)
        quantized = fake_quantize(x, self._scale, self._zero_point, self.inputs.grid.max_code, self.inputs.axis)
        new_args = tuple(quantized if value is x else value for value in args)
        return new_args, {key: quantized if value is x else value for key, value in kwargs.items()}


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input that is quantized: the first tensor among the arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, InputQuantization]]:
    """Name, module and key of every such hook; read from the modules, for a copied model has no handles to them."""
    for name, module in model.named_modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, InputQuantization):
                yield normalise_name(name), module, key, hook


def attached(model: nn.Module) -> dict[str, InputGrid]:
    """The layers of a model whose inputs are quantized, by name."""
    return {name: hook.inputs for name, _, _, hook in _hooks(model)}


def attach(model: nn.Module, inputs: Mapping[str, InputGrid]) -> None:
    """Quantize inputs of layers from now on, in the place of what was attached to them before.

    Raises:
        FingerprintError: The model lacks a layer; nothing is attached then.
    """
    modules = {normalise_name(name): module for name, module in model.named_modules()}
    absent = [name for name in inputs if name not in modules]
    if absent:
        raise FingerprintError(
            "Activation ranges belong to another model",
            got=f"ranges of {', '.join(absent[:8])}",
            expected=f"layers among {', '.join(list(select_layers(model))[:12])}",
        )
    present = attached(model)
    # Compiled modules would be compiled again for hooks that are no others than before.
    changed = {name: grid for name, grid in inputs.items() if present.get(name) is not grid}
    detach(model, changed)
    for name, grid in changed.items():
        modules[name].register_forward_pre_hook(InputQuantization(grid), with_kwargs=True)


def detach(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, InputGrid]:
    """Leave inputs in floating point again, those of all layers when none are named; returns what was attached."""
    chosen = None if layers is None else set(layers)
    found: dict[str, InputGrid] = {}
    for name, module, key, hook in _hooks(model):
        if chosen is None or name in chosen:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            found[name] = hook.inputs
    return found


@contextmanager
def unquantized(model: nn.Module) -> Iterator[dict[str, InputGrid]]:
    """Inputs are in floating point inside the block; yields what is attached."""
    hooks = [(hook, hook.active) for _, _, _, hook in _hooks(model)]
    inputs = attached(model)
    try:
        for hook, _ in hooks:
            hook.active = False
        yield inputs
    finally:
        for hook, active in hooks:
            hook.active = active


def inputs_state(inputs: Mapping[str, InputGrid]) -> dict[str, Any]:
    """Primitives and CPU tensors, to be saved and loaded with ``weights_only=True``."""
    return {
        name: {
            "spec": asdict(one.spec),
            "scale": one.grid.scale.flatten().cpu().clone(),
            "zero_point": one.grid.zero_point.flatten().cpu().clone(),
            "axis": one.axis,
        }
        for name, one in inputs.items()
    }


def inputs_from_state(state: Mapping[str, Any]) -> dict[str, InputGrid]:
    """Read :func:`inputs_state`."""
    found: dict[str, InputGrid] = {}
    for name, values in state.items():
        spec = ActivationGrid(**values["spec"])
        scale, zero = values["scale"].reshape(1, -1, 1).clone(), values["zero_point"].reshape(1, -1, 1).clone()
        found[name] = InputGrid(spec, Grid(IntGrid(spec.bits, symmetric=spec.symmetric), scale, zero), values["axis"])
    return found
