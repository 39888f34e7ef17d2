"""What a correction returns: one row per corrected layer, and what could not be corrected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class CorrectedLayer:
    """One corrected layer.

    Attributes:
        name: Dotted name in the model.
        type: Class name of the module.
        before: Distance to the target before the correction. For statistics and biases: the root mean square
            difference of the channels' means (and standard deviations), over the root mean square of the dense
            standard deviations. For batch-norm resets: the same distance from the old to the new running statistics.
            For tuning: squared output error over the squared dense output, on held-out batches.
        after: The same distance, measured after the correction; None where there is nothing to measure.
        note: Everything out of the ordinary; empty when there is nothing.
    """

    name: str
    type: str
    before: float
    after: float | None = None
    note: str = ""


@dataclass(frozen=True)
class CorrectionReport:
    """What one correction changed.

    Attributes:
        method: ``"batch_norm"``, ``"statistics"``, ``"bias"``, ``"global"`` or ``"vectors"``.
        layers: One row per corrected layer, in the order of execution.
        skipped: Layers that were not corrected, with the reason.
        batches: Number of batches that were used.
        seconds: Wall time.
        objective: What tuning minimises, on held-out batches, before and after; None for the other methods.
        steps: Optimizer steps that were taken.
        notes: Everything out of the ordinary about the correction as a whole.
    """

    method: str
    layers: list[CorrectedLayer] = field(default_factory=list)
    skipped: Mapping[str, str] = field(default_factory=dict)
    batches: int = 0
    seconds: float = 0.0
    objective: tuple[float, float] | None = None
    steps: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        change = "" if self.objective is None else f", objective {self.objective[0]:.4g} -> {self.objective[1]:.4g}"
        return f"Correct({self.method}): {len(self.layers)} layers, {len(self.skipped)} left out{change}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        objective = None if self.objective is None else list(self.objective)
        return asdict(self) | {"skipped": dict(self.skipped), "objective": objective, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CorrectionReport:
        """What :meth:`to_dict` has kept."""
        objective = values["objective"]
        return cls(
            **dict(values)
            | {
                "layers": [CorrectedLayer(**row) for row in values["layers"]],
                "objective": None if objective is None else (objective[0], objective[1]),
                "notes": tuple(values["notes"]),
            }
        )
