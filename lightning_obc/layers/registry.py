"""Which adapter handles which type of module."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_obc.errors import SpecError
from lightning_obc.layers.base import LayerAdapter
from lightning_obc.layers.conv import ConvAdapter
from lightning_obc.layers.linear import LinearAdapter

_ADAPTERS: dict[type[nn.Module], LayerAdapter] = {
    nn.Linear: LinearAdapter(),
    nn.Conv1d: ConvAdapter(),
    nn.Conv2d: ConvAdapter(),
    nn.Conv3d: ConvAdapter(),
}


def register_adapter(module_type: type[nn.Module], adapter: LayerAdapter, *, override: bool = False) -> None:
    """Let an adapter handle a type of module, and its subclasses that keep the type's ``forward``.

    Raises:
        SpecError: The type already has an adapter and ``override`` is False.
    """
    if module_type in _ADAPTERS and not override:
        raise SpecError(
            f"{module_type.__name__} already has an adapter",
            got=type(adapter).__name__,
            expected="a type without an adapter",
            remedy="pass override=True to replace it",
        )
    _ADAPTERS[module_type] = adapter


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter that handles a module, or None; :func:`reason_unsupported` then says why."""
    base = _registered_base(type(module))
    if base is None or reason_unsupported(module) is not None:
        return None
    return _ADAPTERS[base]


def reason_unsupported(module: nn.Module) -> str | None:
    """Why no adapter handles a module, or None when one does."""
    kind = type(module)
    base = _registered_base(kind)
    if base is None:
        return f"no adapter for {kind.__name__}"
    if kind.forward is not base.forward:
        return f"{kind.__name__} overrides the forward of {base.__name__}; register an adapter for it"
    weight = getattr(module, "weight", None)
    if isinstance(weight, UninitializedParameter):
        return "its weight is not initialised yet; run one batch first"
    if not isinstance(weight, nn.Parameter):
        return "its weight is no parameter of its own (recomputed by a hook or a parametrization)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return None


def _registered_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    return next((base for base in kind.__mro__ if base in _ADAPTERS), None)
