"""Which layers of a model: names, globs and type names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from lightning_obc.errors import LayerNotFoundError, UnsupportedLayerError
from lightning_obc.layers.parts import LayerPart
from lightning_obc.layers.registry import adapter_for, is_lookup, parts_of, reason_unsupported, weight_key

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def normalise_name(name: str) -> str:
    """A module's name without the ``_orig_mod`` that ``torch.compile`` inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def select_layers(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """The layers to compress, by name, in module order.

    Args:
        model: Any module; compiled modules are seen through.
        layers: Names, globs over dotted names (``*`` also matches dots) or type names such as ``"Conv2d"`` or
            ``"torch.nn.Linear"``, which include subclasses. A container stands for all layers inside.
            None means every layer that an adapter handles.
        exclude: Entries of the same kinds to leave out.

    Returns:
        Modules by name; a module with several weights (attention, recurrent layers) comes as its parts. A shared
        module appears once, under its first name; of modules that share a weight the first one stands for all
        (before embeddings, whichever of them is named), and none is selected when one of them is excluded.

    Raises:
        LayerNotFoundError: An entry, or the whole selection, matches nothing.
        UnsupportedLayerError: An entry names a module without any layer that an adapter handles.
    """
    modules = _named(model)
    supported = {name: module for name, module in modules.items() if adapter_for(module) is not None}
    chosen = set(supported) if layers is None else _matching(modules, supported, layers)
    excluded = set() if exclude is None else _matching(modules, supported, exclude, excluding=True)
    left_out = {weight_key(supported[name]) for name in excluded}
    wanted = {weight_key(supported[name]) for name in chosen} - left_out
    result = {name: module for name, module in _first_of_each(supported) if weight_key(module) in wanted}
    if not result:
        left = [f"{name or 'the model itself'}: {reason}" for name, reason in unsupported_layers(model).items()]
        raise LayerNotFoundError(
            "No layer is left to compress",
            got=f"layers={layers}, exclude={exclude}" if supported else "; ".join(left[:5]) or type(model).__name__,
            expected=f"at least one of {_few(list(supported))}" if supported else "a model with supported layers",
        )
    return result


def _first_of_each(supported: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """One module for each weight, in module order: the first that multiplies with it, or else the first."""
    first: dict[int, str] = {}
    for name, module in supported.items():
        key = weight_key(module)
        if key not in first or (is_lookup(supported[first[key]]) and not is_lookup(module)):
            first[key] = name
    names = set(first.values())
    return [(name, module) for name, module in supported.items() if name in names]


def sharing_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """By name of a layer: the other modules of the model that use the same weight, and that an adapter handles."""
    names = {weight_key(module): name for name, module in layers.items()}
    others: dict[str, list[nn.Module]] = {name: [] for name in layers}
    for module in _named(model).values():
        name = names.get(weight_key(module)) if adapter_for(module) is not None else None
        if name is not None and not _same_layer(module, layers[name]):
            others[name].append(module)
    return others


def _same_layer(first: nn.Module, second: nn.Module) -> bool:
    """Parts are made anew for every selection; they are the same layer when their owner is."""
    if isinstance(first, LayerPart) and isinstance(second, LayerPart):
        return first.owner is second.owner
    return first is second


def unsupported_layers(model: nn.Module) -> dict[str, str]:
    """Modules with weights of their own that no adapter handles, and why.

    Normalisation layers, and modules whose own parameters are vectors (biases, scales), are not listed. A module that
    shares its weight with a handled layer (an embedding tied to an output layer) says so: compression changes it too.
    """
    modules = _named(model)
    shared = {weight_key(module): name for name, module in modules.items() if adapter_for(module) is not None}
    handled = {name for name, module in modules.items() if adapter_for(module) is not None or parts_of(module)}
    return {
        name: (reason_unsupported(module) or "") + _shared_with(module, shared)
        for name, module in modules.items()
        if name not in handled and not isinstance(module, _NORMS) and _carries_weights(module)
    }


def _shared_with(module: nn.Module, shared: Mapping[int, str]) -> str:
    names = [shared[id(weight)] for weight in module.parameters(recurse=False) if id(weight) in shared]
    return f"; it shares the weight of {names[0]!r} and changes with it" if names else ""


def _carries_weights(module: nn.Module) -> bool:
    if isinstance(module, ParametrizationList):
        return False
    if hasattr(module, "parametrizations") or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return True
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """First names of all modules and parts, in module order. The innermost module of a compiled one keeps the name."""
    named: dict[str, nn.Module] = {}
    for full_name, module in model.named_modules():
        name = normalise_name(full_name)
        if isinstance(named.get(name), LayerPart):
            continue
        named[name] = module
        named |= {f"{name}.{label}" if name else label: part for label, part in parts_of(module).items()}
    return named


def _first_name(modules: dict[str, nn.Module], entry: str) -> str | None:
    """The first name of the module that ``entry`` also names, or None."""
    try:
        module = modules[""].get_submodule(entry)
    except AttributeError:
        return None
    return next((name for name, other in modules.items() if other is module), None)


def _matching(
    modules: dict[str, nn.Module],
    supported: dict[str, nn.Module],
    entries: Sequence[str],
    excluding: bool = False,
) -> set[str]:
    """Names that the entries select. Entries that select nothing raise."""
    names: set[str] = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        entry = normalise_name(entry)
        exact = entry if entry in modules else _first_name(modules, entry)
        hits = {exact} if exact is not None else {name for name in modules if fnmatchcase(name, entry)}
        hits = hits or {name for name, module in modules.items() if _is_type(module, entry)}
        found = {name for name in supported if hits & _names_above(name)}
        if not hits or not (found or excluding or exact is not None):
            raise _unknown(entry, modules, supported)
        if not found and not excluding:
            raise UnsupportedLayerError(
                f"Layer {entry!r} cannot be compressed",
                got=reason_unsupported(modules[exact]) if exact else entry,
                expected="a layer that an adapter handles, or a module with such layers inside",
                remedy="remove it from the selection, or register an adapter",
            )
        names |= found
    return names


def _names_above(name: str) -> set[str]:
    """The name itself and those of all modules around it."""
    parts = name.split(".") if name else []
    return {".".join(parts[:depth]) for depth in range(len(parts) + 1)}


def _is_type(module: nn.Module, entry: str) -> bool:
    for kind in type(module).__mro__:
        qualified = f"{kind.__module__}.{kind.__qualname__}"
        public = f"torch.nn.{kind.__name__}" if getattr(torch.nn, kind.__name__, None) is kind else qualified
        if entry in (kind.__name__, qualified, public):
            return True
    return False


def _unknown(entry: str, modules: dict[str, nn.Module], supported: dict[str, nn.Module]) -> LayerNotFoundError:
    types = {type(module).__name__ for module in supported.values()}
    close = difflib.get_close_matches(entry, [*modules, *types], n=5, cutoff=0.5)
    return LayerNotFoundError(
        "A layer name, glob or type matches nothing in the model",
        got=repr(entry),
        expected=f"one of {_few(close or list(supported))}",
        remedy="check the names with dict(model.named_modules())",
    )


def _few(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
