"""Weights that training must not change back: zeros of pruned layers, and grids of quantized ones.

Nothing is added to the model: no buffers, parametrizations or wrappers, so that state-dict keys stay what they were.
Masks and grids live in the callback's state; the weights themselves always carry the zeros and the grid points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.errors import FingerprintError, LayerNotFoundError, PatternError, UnsupportedLayerError
from lightning_obc.grids import Grid
from lightning_obc.layers import LayerAdapter, adapter_for, select_layers
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, IntGrid, Pattern, Prune, Quantize, Stage, Structured, Unstructured


@dataclass(frozen=True)
class HeldLayer:
    """What is held of one layer, in matrix layout ``[g, R, d]`` on the CPU.

    Attributes:
        mask: bool, True = kept; None for a layer that was never pruned.
        grid: The grid of a quantized layer.
        latent: float32 weights before rounding, of a layer that goes on training on its grid; None for a frozen one.
        pattern: The pattern that the zeros of the mask obey.
    """

    mask: Tensor | None = None
    grid: Grid | None = None
    latent: Tensor | None = None
    pattern: Pattern | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only, so that ``torch.load(weights_only=True)`` reads it."""
        return {
            "mask": self.mask,
            "grid": None if self.grid is None else _grid_state(self.grid),
            "latent": self.latent,
            "pattern": None if self.pattern is None else _pattern_state(self.pattern),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> HeldLayer:
        grid, pattern = state["grid"], state["pattern"]
        return cls(
            state["mask"],
            None if grid is None else _grid_from_state(grid),
            state["latent"],
            None if pattern is None else _pattern_from_state(pattern),
        )


def _pattern_state(pattern: Pattern) -> dict[str, Any]:
    return {"type": type(pattern).__name__, **vars(pattern)}


def _pattern_from_state(state: Mapping[str, Any]) -> Pattern | None:
    types = {kind.__name__: kind for kind in (Unstructured, NM, Block, Structured)}
    values = {key: value for key, value in state.items() if key != "type"}
    return types[state["type"]](**values) if state["type"] in types else None


def _grid_state(grid: Grid) -> dict[str, Any]:
    return {
        "spec": asdict(grid.spec),
        "scale": grid.scale.detach().cpu(),
        "zero_point": grid.zero_point.detach().cpu(),
        "column_group": None if grid.column_group is None else grid.column_group.cpu(),
    }


def _grid_from_state(state: Mapping[str, Any]) -> Grid:
    return Grid(IntGrid(**state["spec"]), state["scale"], state["zero_point"], state["column_group"])


class HeldWeights:
    """The held layers of one model.

    ``bind(model)`` connects them with its live weights; ``apply_()`` then puts every held weight back in its place.
    """

    def __init__(self) -> None:
        self.layers: dict[str, HeldLayer] = {}
        self._bound: dict[str, _Bound] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a callback must not drag the model along.
        self._pull_latents()
        return {"layers": dict(self.layers), "_bound": {}}

    def hold(self, name: str, module: nn.Module, stage: Stage, solution: LayerSolution) -> None:
        """Take over a layer's solution, which has been written into its weight already.

        Raises:
            PatternError: Weights that an earlier stage pruned have come back.
        """
        layer = self.layers.get(name, HeldLayer())
        if isinstance(stage, Prune):
            mask = solution.mask.detach().cpu()
            if layer.mask is not None and bool((mask & ~layer.mask).any()):
                raise PatternError(
                    f"{stage} brings pruned weights back",
                    got=f"layer {name!r}: {int((mask & ~layer.mask).sum())} weights",
                    expected="masks that only grow",
                )
            layer = replace(layer, mask=mask, pattern=stage.parsed)
        elif isinstance(stage, Quantize):
            latent = solution.weight.detach().float().cpu() if stage.after == "train" else None
            layer = replace(layer, grid=solution.grid, latent=latent)
        self.layers[name] = layer
        bound = _Bound.make(module, layer)
        if bound is not None:
            self._bound[name] = bound

    def bind(self, model: nn.Module) -> None:
        """Connect with the weights of a model, which hold the zeros and grid points already.

        Raises:
            FingerprintError: A held layer is not there, or has another shape.
        """
        self._pull_latents()
        modules = _compressible(model) if self.layers else {}
        bound = {name: _Bound.make(_find(modules, name, layer), layer) for name, layer in self.layers.items()}
        _check_live(bound, self.layers)
        self._bound = {name: held for name, held in bound.items() if held is not None}

    def kept(self) -> Any:
        """What is held now, for :meth:`take_back`."""
        return dict(self.layers), dict(self._bound)

    def take_back(self, kept: Any) -> None:
        """Hold again what was held at an earlier :meth:`kept`; the weights must be those of that time."""
        self.layers, self._bound = kept

    def copy_of(self, model: nn.Module) -> HeldCopy:
        """What is held, for another model with the same layers, such as an average of the weights."""
        modules = _compressible(model) if self.layers else {}
        bound = {name: _Bound.make(_find(modules, name, layer), layer) for name, layer in self.layers.items()}
        for name, held in bound.items():
            live = self._bound.get(name)
            if held is not None and held.frozen is not None and live is not None and live.frozen is not None:
                held.frozen.copy_(live.frozen)
        return HeldCopy([held for held in bound.values() if held is not None])

    @torch.no_grad()
    def rebase_(self) -> None:
        """Weights of layers that train on their grid may have been replaced by others that lie on it: go on there."""
        for bound in self._bound.values():
            bound.rebase_()

    def unbind(self) -> None:
        """Let go of the model; what is held stays held."""
        self._pull_latents()
        self._bound = {}

    @torch.no_grad()
    def apply_(self, touched: Callable[[frozenset[int]], bool] | None = None) -> None:
        """Put every held weight of the bound model back in its place. Applying twice changes nothing.

        Args:
            touched: Says of the ids of a layer's parameters whether one of them may have changed; None means all may.
        """
        for bound in self._bound.values():
            if touched is None or touched(bound.parameters):
                bound.apply_()

    def _pull_latents(self) -> None:
        for name, bound in self._bound.items():
            if bound.latent is not None:
                self.layers[name] = replace(self.layers[name], latent=bound.latent.detach().cpu().clone())

    def state_dict(self) -> dict[str, Any]:
        self._pull_latents()
        return {name: layer.state_dict() for name, layer in self.layers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bound = {}
        self.layers = {name: HeldLayer.from_state(layer) for name, layer in state.items()}


def _check_live(bound: Mapping[str, _Bound | None], layers: Mapping[str, HeldLayer]) -> None:
    """Held weights are frozen as they are: they must really have the zeros and grid points of the state."""
    wrong = [name for name, held in bound.items() if held is not None and not held.is_live(layers[name])]
    if wrong:
        raise FingerprintError(
            "The live weights are not those that were compressed",
            got=f"no zeros or grid points where the state has them, in {', '.join(wrong)}",
            expected="the weights that the compression state belongs to",
            remedy="load the checkpoint that was written with this state, or use a new OBCCallback",
        )


def _compressible(model: nn.Module) -> Mapping[str, nn.Module]:
    try:
        return select_layers(model)
    except LayerNotFoundError:
        return {}


def _find(modules: Mapping[str, nn.Module], name: str, layer: HeldLayer) -> nn.Module:
    module = modules.get(name)
    adapter = None if module is None else adapter_for(module)
    held = layer.mask if layer.mask is not None else layer.latent
    if module is None or adapter is None:
        got = f"no compressible layer {name!r}"
    else:
        shape = adapter.shape(module)
        if held is None or tuple(held.shape) == (shape.groups, shape.rows, shape.columns):
            return module
        got = f"layer {name!r} of {shape.groups}×{shape.rows}×{shape.columns}, held {tuple(held.shape)}"
    raise FingerprintError(
        "The compression state belongs to another model",
        got=got,
        expected="the model that the checkpoint was written for",
        remedy="resume with the same model, or start without ckpt_path",
    )


@dataclass
class _Bound:
    """A held layer on the device of its live weight, in the layout of the module."""

    module: nn.Module
    adapter: LayerAdapter
    weight: Tensor
    pruned: Tensor | None
    frozen: Tensor | None
    grid: Grid | None = None
    latent: Tensor | None = None
    last: Tensor | None = None

    @cached_property
    def parameters(self) -> frozenset[int]:
        """Ids of the parameters of the module."""
        return frozenset(map(id, self.adapter.owner(self.module).parameters()))

    @classmethod
    def make(cls, module: nn.Module, layer: HeldLayer) -> _Bound | None:
        """None for a weight that a parametrization computes: nothing can be held there while training."""
        adapter = adapter_for(module)
        assert adapter is not None
        if is_computed(module):
            return None
        weight = adapter.weight(module)
        pruned = None
        if layer.mask is not None:
            pruned = placed_like(~adapter.to_module_layout(module, layer.mask), weight)
        if layer.grid is None:
            return cls(module, adapter, weight, pruned, None)
        value = weight.detach().clone()
        if layer.latent is None:
            return cls(module, adapter, weight, pruned, value)
        grid = _moved(layer.grid, weight.device)
        latent = layer.latent.to(weight.device, copy=True)
        return cls(module, adapter, weight, pruned, None, grid, latent, value)

    def is_live(self, layer: HeldLayer) -> bool:
        """True when the live weight has the zeros, and of a frozen layer the grid points, that are held."""
        if self.pruned is not None and bool((self.weight.masked_fill(~self.pruned, 0.0) != 0).any()):
            return False
        if layer.grid is None or layer.latent is not None:
            return True
        matrix = self.adapter.weight_matrix(self.module)
        # Grid points are rounded to the weight's own precision, and the grid itself to float32 here.
        rounding = 4 * max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)
        nearest = _moved(layer.grid, matrix.device).quantize(matrix.float())
        return bool(((nearest - matrix.float()).abs() <= rounding * matrix.float().abs()).all())

    def project_(self) -> None:
        """Put a copy's weight, wherever it has been moved, on its mask and grid."""
        if self.frozen is not None:
            self.weight.copy_(self.frozen)
        elif self.grid is not None:
            if self.grid.scale.device != self.weight.device:
                self.grid = _moved(self.grid, self.weight.device)
            matrix = self.adapter.weight_matrix(self.module).float()
            self.adapter.write_weight_(self.module, self.grid.quantize(matrix))
        if self.pruned is not None:
            self.pruned = self.pruned.to(self.weight.device)
            self.weight.masked_fill_(self.pruned, 0.0)

    def rebase_(self) -> None:
        if self.latent is None or self.last is None or torch.equal(self.last, self.weight):
            return
        self.latent.copy_(self.adapter.to_matrix_layout(self.module, self.weight.detach().float()))
        self.last.copy_(self.weight)

    def apply_(self) -> None:
        if self.frozen is not None:
            self.weight.copy_(self.frozen)
        if self.grid is not None and self.latent is not None and self.last is not None:
            # Straight-through: the gradient was taken at the grid point; its step goes to the weight before rounding.
            step = self.adapter.to_matrix_layout(self.module, self.weight.detach().float() - self.last.float())
            self.latent.add_(step)
            self.adapter.write_weight_(self.module, self.grid.quantize(self.latent))
        if self.pruned is not None:
            self.weight.masked_fill_(self.pruned, 0.0)
        if self.last is not None:
            self.last.copy_(self.weight)


@dataclass
class HeldCopy:
    """The held layers of a copy of the model; its weights change by other hands than an optimizer's."""

    bound: list[_Bound]

    @torch.no_grad()
    def apply_(self) -> None:
        """Put the copy's weights on masks and grids. Applying twice changes nothing."""
        for bound in self.bound:
            bound.project_()


def is_computed(module: nn.Module) -> bool:
    """True when a layer's weight is computed by a parametrization, so that there is no tensor to hold."""
    adapter = adapter_for(module)
    assert adapter is not None
    try:
        adapter.weight(module)
    except UnsupportedLayerError:
        return True
    return False


def _moved(grid: Grid, device: torch.device) -> Grid:
    group = None if grid.column_group is None else grid.column_group.to(device)
    return Grid(grid.spec, grid.scale.float().to(device), grid.zero_point.float().to(device), group)


def placed_like(value: Tensor, weight: Tensor) -> Tensor:
    """``value`` on the device of, and sharded like, a weight of the same shape."""
    value = value.to(weight.device)
    if not hasattr(weight, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = weight
    return distribute_tensor(value.contiguous(), sharded.device_mesh, sharded.placements)
