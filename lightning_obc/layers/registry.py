"""Which adapter handles which type of module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from lightning_obc.errors import SpecError
from lightning_obc.layers.attention import attention_parts
from lightning_obc.layers.base import LayerAdapter
from lightning_obc.layers.conv import ConvAdapter, ConvTransposeAdapter
from lightning_obc.layers.linear import LinearAdapter, TransposedLinearAdapter
from lightning_obc.layers.lookup import LookupAdapter
from lightning_obc.layers.parametrized import reason_not_invertible
from lightning_obc.layers.parts import LayerPart
from lightning_obc.layers.recurrent import recurrent_parts

Parts = Callable[[nn.Module], dict[str, LayerPart]]

_ADAPTERS: dict[type[nn.Module], LayerAdapter] = {
    nn.Linear: LinearAdapter(),
    nn.Conv1d: ConvAdapter(),
    nn.Conv2d: ConvAdapter(),
    nn.Conv3d: ConvAdapter(),
    nn.ConvTranspose1d: ConvTransposeAdapter(),
    nn.ConvTranspose2d: ConvTransposeAdapter(),
    nn.ConvTranspose3d: ConvTransposeAdapter(),
    nn.Embedding: LookupAdapter(),
}
# Types of packages that are not imported here, by their full names.
_BY_NAME: dict[str, LayerAdapter] = {"transformers.pytorch_utils.Conv1D": TransposedLinearAdapter()}
_PARTS: dict[type[nn.Module], Parts] = {
    nn.MultiheadAttention: attention_parts,
    nn.LSTM: recurrent_parts,
    nn.GRU: recurrent_parts,
}


def register_adapter(module_type: type[nn.Module], adapter: LayerAdapter, *, override: bool = False) -> None:
    """Let an adapter handle a type of module, and its subclasses that keep the type's ``forward``.

    Example:
        >>> import torch
        >>> from lightning_obc.layers import adapter_for, register_adapter
        >>> from lightning_obc.layers.linear import LinearAdapter
        >>> class Scaled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> adapter_for(Scaled(4, 2)) is None
        True
        >>> register_adapter(Scaled, LinearAdapter())
        >>> adapter_for(Scaled(4, 2)).shape(Scaled(4, 2))
        ProblemShape(groups=1, rows=2, columns=4, channels=4)

    Raises:
        SpecError: The type already has an adapter and ``override`` is False.
    """
    _refuse_duplicate(module_type, adapter, override)
    _PARTS.pop(module_type, None)
    _ADAPTERS[module_type] = adapter


def register_parts(module_type: type[nn.Module], parts: Parts, *, override: bool = False) -> None:
    """Let a function split a type of module that owns several weights into parts, by name.

    Raises:
        SpecError: The type already has an adapter and ``override`` is False.
    """
    _refuse_duplicate(module_type, parts, override)
    _ADAPTERS.pop(module_type, None)
    _PARTS[module_type] = parts


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter that handles a module, or None; :func:`reason_unsupported` then says why."""
    if isinstance(module, LayerPart):
        return module.adapter
    base = _base(type(module))
    if base is None or reason_unsupported(module) is not None:
        return None
    return _adapter_of(base)


def parts_of(module: nn.Module) -> dict[str, LayerPart]:
    """The layers that a module with several weights stands for, by name; empty for all others."""
    base = _base(type(module))
    if base not in _PARTS or reason_unsupported(module) is not None:
        return {}
    return _PARTS[base](module)


def is_lookup(module: nn.Module) -> bool:
    """True for layers whose rows are looked up, such as embeddings: quantized only, without activations."""
    adapter = adapter_for(module)
    return adapter is not None and adapter.lookup


def weight_key(module: nn.Module) -> int:
    """The same number for layers that share one weight, and for no others."""
    adapter = adapter_for(module)
    weight = None if adapter is None else adapter.current(module)
    return id(weight if isinstance(weight, nn.Parameter) else module)


def reason_unsupported(module: nn.Module) -> str | None:
    """Why neither an adapter nor parts handle a module, or None when they do."""
    kind = type(module)
    base = _base(kind)
    if base is None:
        own = ", ".join(name for name, _ in module.named_parameters(recurse=False))
        return f"no adapter for {kind.__name__}" + (f" (its own parameters: {own})" if own else "")
    if kind.forward is not base.forward:
        return f"{kind.__name__} overrides the forward of {base.__name__}; register an adapter for it"
    if base in _PARTS:
        return "a module with several weights, some of them parametrized" if is_parametrized(module) else None
    if getattr(module, "max_norm", None) is not None:
        return "its forward rescales its rows (max_norm)"
    return _reason_weight(module)


def _reason_weight(module: nn.Module) -> str | None:
    if is_parametrized(module, "weight"):
        return reason_not_invertible(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, UninitializedParameter):
        return "its weight is not initialised yet; run one batch first"
    if not isinstance(weight, nn.Parameter):
        return "its weight is no parameter of its own (a hook recomputes it)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return None


def _adapter_of(kind: type[Any]) -> LayerAdapter | None:
    return _ADAPTERS.get(kind) or _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")


def _base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The nearest type in the method resolution order that is registered."""
    return next((base for base in kind.__mro__ if base in _PARTS or _adapter_of(base) is not None), None)


def _refuse_duplicate(module_type: type[nn.Module], value: Any, override: bool) -> None:
    if not override and (_adapter_of(module_type) is not None or module_type in _PARTS):
        raise SpecError(
            f"{module_type.__name__} already has an adapter",
            got=getattr(value, "__name__", type(value).__name__),
            expected="a type without an adapter",
            remedy="pass override=True to replace it",
        )
