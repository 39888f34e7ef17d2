"""What containers hold, one level at a time: of PyTorch's own kinds, other mappings, and data classes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_obc.calibration.batches import rebuilt


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A container like ``value`` with the function's results on its entries; what is no container as it is.

    Lists, tuples, mappings and data classes are containers. Other objects are not, registered with PyTorch's pytrees
    or not: blocks write to caches.
    """
    if not isinstance(value, (list, tuple, Mapping)):
        return _data_class(function, value) if _is_data(value) else value
    entries, spec = tree_flatten(value, is_leaf=lambda x: x is not value)
    if not spec.is_leaf():
        return tree_unflatten([function(entry) for entry in entries], spec)
    if isinstance(value, Mapping):
        return rebuilt(value, {key: function(entry) for key, entry in value.items()})
    return value


def leaves(value: Any) -> list[Any]:
    """What lists, tuples and the mappings that PyTorch knows hold, however deep."""
    return tree_leaves(value, is_leaf=lambda x: not isinstance(x, (list, tuple, Mapping)))


def is_opaque(leaf: Any) -> bool:
    """True for a leaf that is a container nevertheless: one that PyTorch does not look into."""
    return isinstance(leaf, Mapping) or _is_data(leaf)


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _data_class(function: Callable[[Any], Any], value: Any) -> Any:
    """The same object when nothing in it changes: blocks may write to it."""
    now = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)}
    found = {name: function(entry) for name, entry in now.items()}
    if all(found[name] is entry for name, entry in now.items()):
        return value
    twin = copy.copy(value)
    for name, entry in found.items():
        object.__setattr__(twin, name, entry)
    return twin
