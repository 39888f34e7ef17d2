"""Per-layer output error over the dense output's norm: what global tuning minimises."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.correction.channels import observed
from lightning_obc.correction.passes import Forward, first_tensor, run_batch
from lightning_obc.errors import LayerNotFoundError, LayerNotReachedError, ShapeError
from lightning_obc.layers import normalise_name
from lightning_obc.layers.parts import LayerPart


@dataclass(frozen=True)
class LayerErrors:
    """Sums over one or more batches, by layer name.

    Attributes:
        error: ``‖y' - y‖²``, scalars with gradients.
        norm: ``‖y‖²``, scalars.
    """

    error: dict[str, Tensor]
    norm: dict[str, Tensor]

    def mean(self) -> Tensor:
        """Mean over layers of ``error / norm``, a scalar with gradients. Layers that are zero in the dense model, as
        far as these batches go, count with their absolute error."""
        terms = [error / _nonzero(self.norm[name]) for name, error in self.error.items()]
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

    def plus(self, other: LayerErrors) -> LayerErrors:
        """The sums over the batches of both."""
        return LayerErrors(
            {name: error + other.error[name] for name, error in self.error.items()},
            {name: norm + other.norm[name] for name, norm in self.norm.items()},
        )

    def relative(self) -> dict[str, float]:
        """``error / norm`` by layer name."""
        return {name: float(error / _nonzero(self.norm[name])) for name, error in self.error.items()}


def _nonzero(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def layer_errors(
    model: nn.Module, dense_model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Forward | None
) -> LayerErrors:
    """Run one batch through both models and compare the outputs of the layers.

    Args:
        model: The compressed model.
        dense_model: The dense model; runs without gradients.
        layers: Layers of ``model`` by name. Those whose output stays inside their module are left out.
        batch: One batch.
        forward: ``forward(model, batch)`` runs it; None means the model's own way.

    Raises:
        LayerNotFoundError: The dense model lacks a layer.
        LayerNotReachedError: The batch does not pass through a layer as often as in the dense model.
        ShapeError: An output of another shape than in the dense model.
    """
    targets = {name: target for name, module in layers.items() if (target := observed(module)) is not None}
    dense_targets = _counterparts(layers, targets, dense_model)
    outputs: dict[str, list[Tensor]] = {name: [] for name in targets}
    with ExitStack() as stack, torch.no_grad():
        for name, module in dense_targets.items():
            stack.callback(module.register_forward_hook(_keeping(outputs[name])).remove)
        run_batch(dense_model, batch, forward)
    comparison = {name: _Comparison(name, wanted) for name, wanted in outputs.items()}
    with ExitStack() as stack:
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(comparison[name].hook).remove)
        run_batch(model, batch, forward)
    error = {name: one.error() for name, one in comparison.items()}
    return LayerErrors(error, {name: sum_of_squares(wanted) for name, wanted in outputs.items()})


def _counterparts(
    layers: Mapping[str, nn.Module], targets: Mapping[str, nn.Module], dense_model: nn.Module
) -> dict[str, nn.Module]:
    """The modules of the dense model with the same names."""
    found = {normalise_name(name): module for name, module in dense_model.named_modules()}
    # The output projection of an attention is observed where the attention returns.
    names = {name: name.rpartition(".")[0] if isinstance(layers[name], LayerPart) else name for name in targets}
    missing = [name for name in targets if names[name] not in found]
    if missing:
        raise LayerNotFoundError(
            "The dense model lacks layers of the compressed one",
            got=", ".join(missing),
            expected="a dense model of the same architecture",
            remedy="pass a deep copy of the model, made before compression",
        )
    return {name: found[names[name]] for name in targets}


def _keeping(into: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            # A copy: an activation behind the layer may work in place.
            into.append(tensor.detach().clone())

    return hook


class _Comparison:
    """One layer's squared error against the dense outputs of the same calls, in their order."""

    def __init__(self, name: str, wanted: list[Tensor]) -> None:
        self.name, self.wanted = name, wanted
        self.terms: list[Tensor] = []

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor, call = first_tensor(output), len(self.terms)
        if tensor is None:
            return
        if call >= len(self.wanted) or tensor.shape != self.wanted[call].shape:
            raise ShapeError(
                f"Layer {self.name!r} has another output than in the dense model",
                got=tuple(tensor.shape),
                expected=f"{tuple(self.wanted[call].shape)}" if call < len(self.wanted) else "no further call",
                remedy="exclude layers whose inputs are chosen by earlier outputs, such as heads behind proposals",
            )
        self.terms.append((tensor.float() - self.wanted[call].float()).square().sum())

    def error(self) -> Tensor:
        if not self.terms or len(self.terms) != len(self.wanted):
            raise LayerNotReachedError(
                f"A batch does not pass through layer {self.name!r} as in the dense model",
                got=f"{len(self.terms)} calls",
                expected=f"{len(self.wanted)} calls, and at least one",
                remedy="exclude it, or give the model a calibration_step that calls it",
            )
        return torch.stack(self.terms).sum()


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Scalar float32 sum of all squares."""
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()
