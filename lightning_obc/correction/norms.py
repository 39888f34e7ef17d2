"""Which modules are normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_obc.errors import LayerNotFoundError
from lightning_obc.layers import normalise_name

_KNOWN = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """True for PyTorch's norm layers, and for others that are called norms and scale channels by a vector."""
    if isinstance(module, _KNOWN):
        return True
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def norm_layers(
    model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The normalisation layers of a model, by name, in module order.

    Args:
        model: Any module; compiled modules are seen through.
        layers: Names, globs, type names, or names of containers. None means all.
        exclude: Entries of the same kinds to leave out.

    Raises:
        LayerNotFoundError: An entry, or the whole selection, matches no normalisation layer.
    """
    norms = {normalise_name(name): module for name, module in model.named_modules() if is_norm(module)}
    chosen = set(norms) if layers is None else {name for entry in layers for name in _matches(norms, entry, True)}
    barred = {name for entry in exclude or () for name in _matches(norms, entry, False)}
    result = {name: module for name, module in norms.items() if name in chosen - barred}
    if not result:
        raise LayerNotFoundError(
            "There is no normalisation layer to correct",
            got=f"layers={layers}, exclude={exclude}, {len(norms)} normalisation layers in the model",
            expected="at least one batch-norm, layer-norm or other normalisation layer",
            remedy='use method="bias" or "global" for models without them',
        )
    return result


def _matches(norms: dict[str, nn.Module], entry: str, required: bool) -> list[str]:
    entry = normalise_name(entry)
    found = [
        name
        for name, module in norms.items()
        if fnmatchcase(name, entry)
        or name.startswith(f"{entry}.")
        or entry in {kind.__name__ for kind in type(module).__mro__}
    ]
    if required and not found:
        raise LayerNotFoundError(
            "A name, glob or type matches no normalisation layer",
            got=repr(entry),
            expected=f"one of {', '.join(list(norms)[:5])}" if norms else "a model with normalisation layers",
        )
    return found
