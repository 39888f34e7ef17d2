"""Linear layers whose weight is used without calling the module, as shifted-window attention does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_obc.layers import adapter_for, is_lookup
from lightning_obc.layers.linear import LinearAdapter


class FunctionalCalls(TorchFunctionMode):
    """Reports ``F.linear(x, layer.weight, …)`` for layers that are not being called as modules.

    Args:
        layers: Layers by name; only those of plain linear adapters, and embeddings, are watched.
        report: Called as ``report(name, x)``.
    """

    def __init__(self, layers: Mapping[str, nn.Module], report: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        plain = {name: module for name, module in layers.items() if type(adapter_for(module)) is LinearAdapter}
        rows = {name: module for name, module in layers.items() if is_lookup(module)}
        self._names = {id(module.weight): name for name, module in (plain | rows).items()}
        self._watched = set(plain)
        self._report, self._called = report, set[str]()

    def module_called(self, name: str) -> None:
        """The next use of this layer's weight is the module's own, and already counted."""
        if name in self._watched:
            self._called.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            name = self._names.get(id(given["weight"]))
            if name is not None and name not in self._called:
                self._report(name, given["input"])
            self._called.discard(name or "")
        return func(*args, **kwargs)
