"""Waiting for a monitored metric to stop improving. Knows no Trainer; resumes from its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_obc.errors import ScheduleError
from lightning_obc.schedules import Plateau


@dataclass
class PlateauWatch:
    """Follows the metric of the plateau that the next stage waits for.

    Attributes:
        waiting: ``repr`` of that plateau; another one starts the watch again.
        best: Best value so far; None before the first.
        bad: Values in a row that did not improve on it.
        step: Optimizer step of the last value: a validation that is repeated after a resume does not count twice.
        validated: Names that validations of this process have logged, or None before the first. Not part of the state.
    """

    waiting: str = ""
    best: float | None = None
    bad: int = 0
    step: int = -1
    validated: set[str] | None = None

    def observe(self, plateau: Plateau, value: float, step: int) -> None:
        """Count a value of the metric, logged at an optimizer step."""
        self._turn_to(plateau)
        if step == self.step:
            return
        self.step = step
        better = not math.isnan(value) if self.best is None else plateau.improves(value, self.best)
        if better:
            self.best, self.bad = value, 0
        else:
            self.bad += 1

    def reached(self, plateau: Plateau) -> bool:
        """True when the metric has stopped improving."""
        return self.waiting == repr(plateau) and self.bad >= plateau.patience

    def restart(self) -> None:
        """Forget everything: the model is another one now."""
        self.waiting, self.best, self.bad, self.step = "", None, 0, -1

    def _turn_to(self, plateau: Plateau) -> None:
        if self.waiting != repr(plateau):
            self.restart()
            self.waiting = repr(plateau)

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": self.waiting, "best": self.best, "bad": self.bad, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def monitored(plateau: Plateau, metrics: Mapping[str, Any]) -> float:
    """The value of the monitored metric.

    Raises:
        ScheduleError: The metric is not logged, or is not a single number.
    """
    found = metrics.get(plateau.monitor)
    if found is None or getattr(found, "numel", lambda: 1)() != 1:
        raise ScheduleError(
            "The metric that a stage waits for is not logged" if found is None else "A plateau needs a single number",
            got=f"monitor={plateau.monitor!r}",
            expected=f"one of {', '.join(map(repr, sorted(metrics))) or 'none: the model logs nothing per epoch'}",
            remedy="log it with self.log in validation_step, or in training_step with on_epoch=True",
        )
    return float(found)
