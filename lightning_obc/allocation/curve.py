"""The trade-off curve: metric against budget for every method, as a table, a plot and plain values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_obc.activations import ActivationQuantizer
from lightning_obc.allocation.corrector import Corrector
from lightning_obc.allocation.costs import BASELINE
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.plot import COST_NAMES, LABELS, draw_curve
from lightning_obc.allocation.recipe import write_recipe
from lightning_obc.allocation.search import Profile
from lightning_obc.allocation.stitch import stitch
from lightning_obc.errors import BudgetError
from lightning_obc.files import write_whole
from lightning_obc.obs import LayerSolution
from lightning_obc.report import charts, markdown, render
from lightning_obc.report.scatter import scatter

Method = Literal["uniform", "dp", "spdy"]
COLUMNS = ("budget", "method", "cost", "reduction", "metric", "change", "calibration loss")


@dataclass(frozen=True)
class CurvePoint:
    """One compressed model.

    Attributes:
        budget: Bound on the cost, as a share of the dense cost.
        method: ``"uniform"``, ``"dp"`` or ``"spdy"``.
        cost: Real cost, as a share of the dense cost.
        metric: The metric after stitching and correction.
        loss: The calibration loss after stitching and correction.
        profile: Level by layer name.
        evaluations: Profiles whose loss was computed to find this one.
    """

    budget: float
    method: Method
    cost: float
    metric: float
    loss: float
    profile: Profile = field(repr=False)
    evaluations: int = 0


@dataclass(frozen=True)
class SearchResult:
    """What :func:`~lightning_obc.allocation.tradeoff.search` returns. The model itself is dense again.

    Attributes:
        cost_name: ``"flops"``, ``"bops"``, ``"bytes"`` or ``"seconds"``.
        dense_cost: Cost of the dense float32 model: operations per sample, bytes, or seconds per batch.
        dense_metric: Metric of the dense model.
        points: One for each budget and method that found a profile, in the order of the budgets.
        database: The levels; kept as long as the result is.
        quantizer: Activation ranges, when some level needs them.
        corrector: The correction that ran after stitching.
        notes: Budgets that a method could not meet.
        metric_name: What the metric is called in tables and plots.
    """

    cost_name: str
    dense_cost: float
    dense_metric: float
    points: list[CurvePoint]
    database: Database = field(repr=False)
    quantizer: ActivationQuantizer | None = field(default=None, repr=False)
    corrector: Corrector | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)
    metric_name: str = "metric"

    def point(self, budget: float, method: Method | None = None) -> CurvePoint:
        """The point of a method at a budget; of the least calibration loss when no method is named.

        Raises:
            BudgetError: There is none.
        """
        found = [p for p in self.points if abs(p.budget - budget) < 1e-9 and method in (None, p.method)]
        if not found:
            raise BudgetError(
                "The curve has no such point",
                got=f"budget {budget}, method {method or 'any'}",
                expected=", ".join(f"{p.budget:g} {p.method}" for p in self.points),
            )
        return min(found, key=lambda p: p.loss)

    def apply_(self, model: nn.Module, point: CurvePoint) -> dict[str, LayerSolution]:
        """Stitch a point into the model in place, correct it, and enable its activation quantization.

        The model is the one that was searched, dense or with another point applied: each starts from the dense state.

        Raises:
            SpecError: The point quantizes inputs, and the model is another object than the one that was searched.
        """
        if self.corrector is not None:
            if self.quantizer is not None and any(
                level.activations for level in self.database.profile_levels(point.profile).values()
            ):
                self.quantizer.check_model(model)
            self.corrector.restore_(model)
        solutions = stitch(model, self.database, point.profile, quantizer=self.quantizer)
        if self.corrector is not None:
            self.corrector(model, self.database.profile_levels(point.profile))
        return solutions

    @property
    def _columns(self) -> list[str]:
        return [self.metric_name if name == "metric" else name for name in COLUMNS]

    def rows(self) -> list[list[str]]:
        """Cells of the table."""
        return [
            [
                f"{p.budget:.4g}",
                LABELS[p.method],
                f"{p.cost:.4f}",
                f"{1 / p.cost:.1f}×" if p.cost > 0 else "∞",
                f"{p.metric:.4f}",
                f"{p.metric - self.dense_metric:+.4f}",
                f"{p.loss:.5g}",
            ]
            for p in self.points
        ]

    @property
    def title(self) -> str:
        return (
            f"{COST_NAMES.get(self.cost_name, self.cost_name)} as a share of {BASELINE} ({self._dense_cost}); "
            f"dense {self.metric_name} {self.dense_metric:.4f}"
        )

    @property
    def _dense_cost(self) -> str:
        unit = {"bytes": " bytes", "seconds": " s per batch"}.get(self.cost_name, " per sample")
        return f"{self.dense_cost:.4g}{unit}"

    def table(self) -> str:
        """The curve as text."""
        return "\n".join([render(self.title, self._columns, self.rows()), *self.notes])

    def markdown(self) -> str:
        """The curve as a Markdown table."""
        return "\n".join([markdown(self.title, self._columns, self.rows()), *(f"\n{note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "cost": self.cost_name,
            "baseline": BASELINE,
            "dense_cost": self.dense_cost,
            "metric": self.metric_name,
            "dense_metric": self.dense_metric,
            "points": [dict(vars(point)) for point in self.points],
            "notes": list(self.notes),
        }

    def chart(self) -> dict[str, Any]:
        """The curve as data for a chart of a report: one series per method, and the dense metric."""
        points = [
            {"x": point.budget, "y": point.metric, "label": f"{point.budget:g}", "series": LABELS[point.method]}
            for point in self.points
        ]
        name = f"budget: {COST_NAMES.get(self.cost_name, self.cost_name)}, share of {BASELINE}"
        return {"x": name, "y": self.metric_name, "points": points, "dense": self.dense_metric, "log": True}

    def plot(self, path: str | Path) -> None:
        """Draw metric against cost; the ending of the file's name chooses the format.

        ``.svg`` is drawn with this package's own charts, everything else by matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        if Path(path).suffix == ".svg":
            _write_text(Path(path), charts.standalone(scatter(self.chart(), "Trade-off")))
            return
        draw_curve(self.to_dict(), path)

    @property
    def _by_hand(self) -> dict[str, str]:
        """A remark where a recipe cannot tell the whole: a function that corrected the model."""
        if self.corrector is None or self.corrector.stage is not None:
            return {}
        return {"corrected_by": "a function, which this file cannot run: correct the model again after the recipe"}

    def write(self, directory: str | Path) -> None:
        """Write ``curve.json``, ``curve.md`` and one recipe YAML per point into a directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write_text(directory / "curve.json", json.dumps(self.to_dict(), indent=1))
        _write_text(directory / "curve.md", self.markdown() + "\n")
        for point in self.points:
            remarks = {key: value for key, value in vars(point).items() if key != "profile"}
            name = f"{point.method}-{point.budget:g}.yaml"
            write_recipe(
                directory / name,
                self.database,
                point.profile,
                activations=None if self.quantizer is None else self.quantizer.spec,
                correct=None if self.corrector is None else self.corrector.stage,
                remarks=remarks | {"cost_of": self.cost_name} | self._by_hand,
            )


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
