"""What repairs a stitched model: a function, or a correction stage with what it needs of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Union

import torch
from torch import nn

from lightning_obc.allocation.levels import Level
from lightning_obc.calibration import CalibrationBatches
from lightning_obc.correction import dense_references, run_correction
from lightning_obc.correction_spec import Correct

Correction = Union[Correct, Callable[[nn.Module], Any]]


class Corrector:
    """Corrects models that profiles have been stitched into.

    Args:
        how: A stage, or ``how(model)``.
        model: The dense model, as it is now.
        batches: Calibration batches.
        forward: ``forward(model, batch)``; None means the default of calibration.
    """

    def __init__(
        self,
        how: Correction,
        model: nn.Module,
        batches: CalibrationBatches,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self._how, self._batches, self._forward = how, batches, forward
        self._state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        stages = [how] if isinstance(how, Correct) else []
        self._dense = dense_references(model, stages, batches, forward=forward).get(0)

    @property
    def stage(self) -> Correct | None:
        """The stage; None for a function, which no file can name."""
        return self._how if isinstance(self._how, Correct) else None

    def restore_(self, model: nn.Module) -> None:
        """Undo what stitching and corrections of before did: any of them may have changed anything."""
        with torch.no_grad():
            for key, value in model.state_dict().items():
                value.copy_(self._state[key])

    def __call__(self, model: nn.Module, levels: Mapping[str, Level]) -> None:
        """Correct a model in place.

        Args:
            model: The stitched model.
            levels: Level by layer name.
        """
        if not isinstance(self._how, Correct):
            self._how(model)
            return
        changed = [name for name, level in levels.items() if level.weights != Level()]
        quantized = [name for name in changed if levels[name].grid is not None]
        run_correction(
            model,
            self._how,
            self._batches,
            self._dense,
            compressed=changed,
            quantized=quantized,
            forward=self._forward,
        )
