"""Layers that are physically smaller: pruned input channels leave, and with them the outputs that fed them.

A channel that no row of a layer reads need not be computed. Structured pruning makes such channels; other zeros do not
change what is left to compute. Only chains are cut in which nothing else can see the channel: one layer, operations
that treat every channel by itself, the next layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.fx import Node, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from lightning_obc.errors import ExportError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Softplus, nn.Identity, nn.Dropout),
)
_SPATIAL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Dropout2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
_FUNCTIONS = (
    *(torch.relu, torch.sigmoid, torch.tanh, nn.functional.relu, nn.functional.gelu, nn.functional.silu),
    *(nn.functional.leaky_relu, nn.functional.hardswish, nn.functional.dropout),
)
_METHODS = ("relu", "sigmoid", "tanh", "contiguous")


@dataclass(frozen=True)
class Shrunk:
    """A model whose unread channels are gone.

    Attributes:
        model: A copy with smaller layers and the same state-dict keys; the model that was passed in is unchanged.
        removed: Channels that left, by the layer that no longer reads them.
        kept: Layers with channels that nothing reads, but that had to stay, with the reason.
        before: Parameters of the model.
        after: Parameters of the copy.
    """

    model: nn.Module = field(repr=False)
    removed: Mapping[str, int]
    kept: Mapping[str, str]
    before: int
    after: int

    def __str__(self) -> str:
        lines = [f"{self.after} of {self.before} parameters left ({self.before / max(1, self.after):.2f}× fewer)"]
        lines += [f"{name}: {count} input channels removed" for name, count in self.removed.items()]
        return "\n".join([*lines, *(f"{name}: unread channels stay: {reason}" for name, reason in self.kept.items())])


def shrink(model: nn.Module, sample: Union[Tensor, tuple[Any, ...]]) -> Shrunk:
    """Take input channels that a layer does not read out of it, and out of the layers that make them.

    Cut are Linear and ungrouped convolutions that get their input from another one, through nothing but batch-norms,
    activations, dropout, pooling and flattening. Masks, codes and solutions of the model do not fit the copy: quantize
    it afterwards.

    Args:
        model: Traceable by ``torch.fx``; evaluated in evaluation mode, not changed.
        sample: Example input: a tensor or positional arguments. Outputs of model and copy are compared on it.

    Raises:
        ExportError: The model cannot be traced or run, or the copy's output differs beyond rounding.
    """
    args = sample if isinstance(sample, tuple) else (sample,)
    small = copy.deepcopy(model).eval()
    removed: dict[str, int] = {}
    while True:
        cuts, kept = _cuts(small, args)
        if not cuts:
            break
        # Rows that leave may have been the last to read a channel of the layer before.
        for cut in cuts:
            cut.apply_()
            removed[cut.name] = removed.get(cut.name, 0) + cut.removed
    _check_same(model, small, args)
    small.train(model.training)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, small)]
    return Shrunk(small, removed, kept, *sizes)


@dataclass(frozen=True)
class _Cut:
    """One layer that loses input channels, and what they came through."""

    name: str
    reader: nn.Module
    maker: nn.Module
    norms: tuple[nn.Module, ...]
    keep: Tensor
    positions: int

    @property
    def removed(self) -> int:
        return int((~self.keep).sum())

    def apply_(self) -> None:
        columns = self.keep.repeat_interleave(self.positions)
        _slice_(self.reader, "weight", columns, 1)
        for name in ("weight", "bias"):
            _slice_(self.maker, name, self.keep, 0)
        for norm in self.norms:
            for name in ("weight", "bias", "running_mean", "running_var"):
                _slice_(norm, name, self.keep, 0)
            setattr(norm, "num_features", int(self.keep.sum()))  # noqa: B010 (typed as a tensor)
        width = int(self.keep.sum())
        _set_width(self.reader, "in", width * self.positions)
        _set_width(self.maker, "out", width)


def _slice_(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    old = getattr(module, name)
    if old is None:
        return
    new = old.detach().index_select(dim, keep.nonzero().flatten().to(old.device)).clone()
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _set_width(module: nn.Module, side: str, width: int) -> None:
    setattr(module, f"{side}_{'features' if isinstance(module, nn.Linear) else 'channels'}", width)


def _cuts(model: nn.Module, args: tuple[Any, ...]) -> tuple[list[_Cut], dict[str, str]]:
    """What can leave, and the layers with unread channels that must stay, with the reason."""
    graph = _traced(model, args)
    modules = dict(model.named_modules())
    cuts, kept = [], {}
    for node in graph.nodes:
        reader = modules.get(str(node.target)) if node.op == "call_module" else None
        if reader is None or type(reader) not in (nn.Linear, *_CONVOLUTIONS) or getattr(reader, "groups", 1) > 1:
            continue
        weight: Any = reader.weight
        if bool((weight != 0).flatten(2).any(-1).any(0).all() if weight.dim() > 2 else (weight != 0).any(0).all()):
            continue
        found = _cut(str(node.target), node, modules)
        if isinstance(found, _Cut):
            if not bool(found.keep.all()):
                cuts.append(found)
        else:
            kept[str(node.target)] = found
    return cuts, kept


def _cut(name: str, node: Node, modules: Mapping[str, nn.Module]) -> _Cut | str:
    """The cut in front of a layer, or why there is none."""
    reader, norms, positions = modules[name], list[nn.Module](), 1
    if reason := _not_alone(name, node, modules):
        return reason
    at = node.args[0] if node.args else None
    while isinstance(at, Node) and at.op != "placeholder":
        if len(at.users) > 1:
            return f"{at.name} is used elsewhere too"
        module = modules.get(str(at.target)) if at.op == "call_module" else None
        if type(module) in (nn.Linear, *_CONVOLUTIONS):
            return _from_maker(name, reader, str(at.target), at, norms, positions, modules)
        if type(module) in _NORMS:
            if reason := _not_alone(str(at.target), at, modules):
                return reason
            norms.append(modules[str(at.target)])
        elif _flattens(at, module):
            positions = math.prod(_shape(at.args[0])[2:])
        elif not _by_channel(at, module):
            return f"its input comes through {at.name}"
        at = at.args[0] if at.args else None
    return "its input comes from outside"


def _from_maker(
    name: str,
    reader: nn.Module,
    maker_name: str,
    at: Node,
    norms: list[nn.Module],
    positions: int,
    modules: Mapping[str, nn.Module],
) -> _Cut | str:
    maker: Any = modules[maker_name]
    if reason := _not_alone(maker_name, at, modules):
        return reason
    if getattr(maker, "groups", 1) > 1:
        return f"{maker_name} has groups"
    linear, dims = isinstance(maker, nn.Linear), len(_shape(at))
    if linear and (norms or positions > 1) and dims != 2:
        return f"{maker_name} has its channels behind other dimensions"
    if not linear and dims != maker.weight.dim():
        return f"{maker_name} runs without a batch"
    weight: Any = reader.weight
    channels = maker.weight.shape[0]
    if weight.shape[1] != channels * positions:
        return f"its columns are not the channels of {maker_name}"
    keep = (weight.detach().reshape(weight.shape[0], channels, -1) != 0).any(2).any(0)
    if not bool(keep.any()):
        keep[0] = True  # layers without any channel are not defined
    return _Cut(name, reader, maker, tuple(norms), keep, positions)


def _not_alone(name: str, node: Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a module cannot be cut: others would see it."""
    module = modules[name]
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    if sum(other.op == "call_module" and modules.get(str(other.target)) is module for other in node.graph.nodes) > 1:
        return f"{name} runs several times"
    others = {id(p) for other in set(modules.values()) - {module} for p in other.parameters(recurse=False)}
    if own & others:
        return f"{name} shares its weights"
    if any(other.op == "get_attr" and str(other.target).startswith(f"{name}.") for other in node.graph.nodes):
        return f"the weights of {name} are read elsewhere"
    return f"{name} has hooks" if module._forward_hooks or module._forward_pre_hooks else None


def _flattens(node: Node, module: nn.Module | None) -> bool:
    """True for a flattening of everything behind the channels into them."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    plain = node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten")
    return plain and tuple(node.args[1:]) in ((1,), (1, -1)) and not node.kwargs


def _by_channel(node: Node, module: nn.Module | None) -> bool:
    """True for an operation that makes each channel from the same channel alone."""
    if module is not None:
        spatial = type(module) in _SPATIAL and len(_shape(node)) > 2
        return type(module) in _ELEMENTWISE or spatial
    return node.target in _FUNCTIONS if node.op == "call_function" else node.target in _METHODS


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _traced(model: nn.Module, args: tuple[Any, ...]) -> Any:
    try:
        traced = symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(traced).propagate(*args)
    except Exception as error:
        raise ExportError(
            "The model cannot be traced",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a model that torch.fx follows, and a sample that it takes",
            remedy="pass the part of the model that does the computing",
        ) from error
    return traced.graph


@torch.no_grad()
def _check_same(model: nn.Module, small: nn.Module, args: tuple[Any, ...]) -> None:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        pairs = zip(_tensors(model(*args)), _tensors(small(*args)), strict=True)
        # Sums over fewer terms round otherwise: some units in the last place of the largest output.
        worst = max((float((b - a).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)
    finally:
        for module, mode in training.items():
            module.training = mode
    if not worst < 1e-3:
        raise ExportError(
            "The smaller model computes something else",
            got=f"outputs that differ by {worst:.2g} of the largest one",
            expected="the same outputs but for rounding",
            remedy="report this model; nothing was changed",
        )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.double()]
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in _tensors(value)]
