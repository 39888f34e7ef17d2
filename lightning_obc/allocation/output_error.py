"""The search's own calibration loss: how far a compressed model's outputs are from the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.calibration import call_forward
from lightning_obc.calibration.collect import undisturbed
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.errors import CalibrationError

Forward = Callable[[nn.Module, Any], Any]


class OutputError:
    """Squared error of a model's outputs on calibration batches, relative to the dense model's squared outputs.

    Args:
        model: The dense model, whose outputs are kept.
        batches: Re-iterable.
        forward: ``forward(model, batch)``; None means the default of calibration.

    Raises:
        CalibrationError: The model returns no tensor.
    """

    def __init__(self, model: nn.Module, batches: Any, forward: Forward | None = None) -> None:
        self._batches = list(batches)
        self._forward = forward or call_forward
        self._dense = list(self._outputs(model))
        self._reference = sum(float(y.double().square().sum()) for y in self._dense)

    def __call__(self, model: nn.Module) -> float:
        pairs = zip(self._outputs(model), self._dense, strict=True)
        return sum(float((y - dense).double().square().sum()) for y, dense in pairs) / max(self._reference, 1e-300)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with preserved_rng(), undisturbed(model), torch.no_grad():
            return [_first_tensor(self._forward(model, batch)).float() for batch in self._batches]


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else []
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise CalibrationError(
        "The model returns no tensor to compare", got=type(output).__name__, remedy="pass loss= to the search"
    )
