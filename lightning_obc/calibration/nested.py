"""What containers hold, one level at a time: of PyTorch's own kinds, other mappings, and data classes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_obc.calibration.batches import rebuilt


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A container like ``value`` with the function's results on its entries; what is no container as it is.

    Lists, tuples, mappings and data classes are containers, and what is registered with PyTorch's pytrees. Other
    objects, such as caches that blocks write to, are not.
    """
    entries, spec = tree_flatten(value, is_leaf=lambda x: x is not value)
    if not spec.is_leaf():
        return tree_unflatten([function(entry) for entry in entries], spec)
    if isinstance(value, Mapping):
        return rebuilt(value, {key: function(entry) for key, entry in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _data_class(function, value)
    return value


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
