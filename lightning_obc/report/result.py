"""What a compression run returns: one row per layer and stage, plain enough for tables, JSON and logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Size, nn

from lightning_obc.files import PathLike
from lightning_obc.grids import Grid
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.report.samples import WeightSample
from lightning_obc.specs import Stage

if TYPE_CHECKING:
    from lightning_obc.correction import CorrectionReport


@dataclass(frozen=True)
class LayerReport:
    """One layer after one stage.

    Attributes:
        name: Dotted name in the model.
        type: Class name of the module.
        shape: Shape of the module's weight.
        stage: The stage, such as ``"Prune(2:4)"``.
        sparsity: Fraction of zeros in the weight as it now is.
        bits: Bit width of the weight; its floating width when it is not quantized.
        loss: Squared output error per calibration sample, against the weight before this stage.
        damping_loss: What the damping added to the objective.
        relative_error: ``loss`` over the squared output of the weight before this stage (without bias), per sample.
        held_out: Relative error on held-out calibration samples, where it was measured.
        status: ``"ok"``, or everything out of the ordinary; ``"kept: …"`` for a layer that could not be solved.
        seconds: Wall time of the solve.
        compressed: False when the layer keeps the weights it had.
        inherited: Of ``loss``, what the layer's weights had to start from before any of them was pruned or rounded:
            the error of the inputs behind compressed layers that moving the weights did not repair. None where the
            calibration is independent. ``loss`` and ``relative_error`` are then against the layer's output in the
            model before this stage, inherited error included.
        input_bits: Bit width of the layer's quantized input; None where it stays in floating point.
        total_error: Relative output error of all stages that have solved the layer: of its weights after this stage
            against those before its first one, measured on this stage's calibration inputs; after one stage alone
            its ``relative_error``. None where it is not known: the layer was not solved, or training or a correction
            has moved the weights in between, so that the difference would not be the compression's alone.
        curve: Loss curve of the sweep behind it: share of the weights that are zero (of a quantized layer: of the kept
            weights that are rounded), and damped loss as a share of that of no weights at all. Empty where there was
            no sweep in OBS order.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    stage: str
    sparsity: float
    bits: int
    loss: float
    damping_loss: float
    relative_error: float
    held_out: float | None
    status: str
    seconds: float
    compressed: bool
    inherited: float | None = None
    input_bits: int | None = None
    total_error: float | None = None
    curve: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """A row of :meth:`StageReport.to_dict`, also after JSON."""
        curve = tuple((float(share), float(loss)) for share, loss in values.get("curve", ()))
        return cls(**(dict(values) | {"shape": tuple(values["shape"]), "curve": curve}))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        curve = [[_short(share), _short(loss)] for share, loss in self.curve]
        return asdict(replace(self, curve=())) | {"shape": list(self.shape), "curve": curve}


def counted(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _short(value: float) -> float:
    # Points of a plot: five digits of them are enough.
    return float(f"{value:.5g}")


@dataclass
class RankWork:
    """What one of several ranks had to do in a stage.

    Attributes:
        rank: Number of the rank.
        layers: Layers that it solved; of one whose rows were shared, each rank counts its share.
        flops: Their estimated flop, ⅔·R·d³ for each problem.
        seconds: Time it spent on solving.
    """

    rank: int = 0
    layers: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, repr=False)
class StageReport:
    """One stage of a recipe.

    Attributes:
        stage: The stage, such as ``"Prune(2:4)"``.
        layers: One row for each layer the stage was asked to compress.
        skipped: Layers left as they were on purpose, with the reason.
        solutions: The engine's solutions by layer name, in matrix layout ``[g, R, d]``.
        activations: Grids of the inputs that the stage quantized, by layer name, as ``export_onnx`` takes them.
        samples: Calibration samples behind the Hessians.
        seconds: Wall time of the stage, calibration included.
        work: What each rank did, where several processes have worked together.
    """

    stage: str
    layers: list[LayerReport]
    skipped: Mapping[str, str] = field(default_factory=dict)
    solutions: Mapping[str, LayerSolution] = field(default_factory=dict, repr=False)
    samples: int = 0
    seconds: float = 0.0
    work: Sequence[RankWork] = ()
    activations: Mapping[str, Grid] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} not" if self.failed else ""
        done = f"{counted(len(self.layers) - len(self.failed), 'layer')} compressed{failed}"
        return f"<StageReport {self.stage}: {done}, {self.seconds:.1f} s; table() has the layers>"

    @property
    def loss(self) -> float:
        """Summed squared output error per sample over all compressed layers."""
        return sum(layer.loss for layer in self.layers if layer.compressed)

    @property
    def failed(self) -> dict[str, str]:
        """Layers that could not be solved and keep their weights, with the reason."""
        return {layer.name: layer.status for layer in self.layers if not layer.compressed}

    def table(self) -> str:
        from lightning_obc.report.tables import stage_table

        return stage_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "stage": self.stage,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": dict(self.skipped),
            "samples": self.samples,
            "seconds": self.seconds,
            "work": [asdict(share) for share in self.work],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageReport:
        """What :meth:`to_dict` has kept: rows and figures, without solutions and activations."""
        return cls(
            values["stage"],
            [LayerReport.from_dict(row) for row in values["layers"]],
            values["skipped"],
            samples=values["samples"],
            seconds=values["seconds"],
            work=[RankWork(**share) for share in values.get("work", ())],
        )


@dataclass(frozen=True, repr=False)
class CompressionReport:
    """A whole run.

    Attributes:
        model: The compressed model (the one that was passed in, changed in place).
        stages: One report per stage, in order.
        left_dense: Weight-carrying modules that no stage could handle, with the reason.
        figures: Named figures of the dense and the compressed model: ``{"accuracy": (dense, compressed)}``.
        corrections: One report per correction stage, in order.
        recipe: The stages as given.
        plans: The plans of the stages, as text.
        dense: Weights before the first stage, a sample of each layer's rows, for histograms.
        notes: What a reader of the figures should know, such as when they were measured.
        histograms: Histograms of the weights of layers whose solutions are gone, those of stages before a resume.
    """

    model: nn.Module = field(repr=False)
    stages: list[StageReport]
    left_dense: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    corrections: Sequence[CorrectionReport] = ()
    recipe: Sequence[Stage] = ()
    plans: Sequence[str] = ()
    dense: Mapping[str, WeightSample] = field(default_factory=dict, repr=False)
    notes: Sequence[str] = ()
    histograms: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        rows = list(self.layers.values())
        done = sum(row.compressed for row in rows)
        text = f"{counted(len(self.stages), 'stage')}, {done} of {counted(len(rows), 'layer')} compressed"
        sizes = [float(Size(row.shape).numel()) for row in rows]
        if total := sum(sizes):
            zeros, bits = (
                sum(size * getattr(row, key) for size, row in zip(sizes, rows, strict=True)) / total
                for key in ("sparsity", "bits")
            )
            text += f": {100 * zeros:.1f} % zeros, {bits:.3g} bits"
        return f"<CompressionReport {text}; table() has stages and layers, save() writes them>"

    @property
    def solutions(self) -> dict[str, LayerSolution]:
        """The last solution of every layer."""
        return {name: solution for stage in self.stages for name, solution in stage.solutions.items()}

    @property
    def activations(self) -> dict[str, Grid]:
        """Grids of the quantized inputs by layer name, the last of every layer."""
        return {name: grid for stage in self.stages for name, grid in stage.activations.items()}

    @property
    def layers(self) -> dict[str, LayerReport]:
        """The last row of every layer that was compressed, and the only row of one that was not."""
        rows: dict[str, LayerReport] = {}
        for stage in self.stages:
            for layer in stage.layers:
                if layer.compressed or layer.name not in rows:
                    rows[layer.name] = layer
        return rows

    def table(self) -> str:
        from lightning_obc.report.tables import report_table

        return report_table(self)

    def save(
        self,
        path: PathLike,
        *,
        title: str = "Compression report",
        formats: Sequence[str] | None = None,
        overwrite: bool = False,
        **parts: Any,
    ) -> list[Path]:
        """Write the report as ``path.html`` (one file with everything inside), ``path.md`` and ``path.json``.

        Args:
            path: Without the ending.
            title: Heading.
            formats: Some of html, md and json; by default all, html only where the extra ``report`` is installed.
            overwrite: Replace existing files.
            parts: ``trade_off``, ``measured``, ``reproduce``; see :func:`~lightning_obc.report.report_record`.

        Returns:
            The files.

        Raises:
            ExportError: A file exists or cannot be written. SpecError: An unknown format. MissingExtraError: HTML is
                asked for without the extra ``report``.
        """
        from lightning_obc.report.document import default_formats, save_report
        from lightning_obc.report.record import report_record

        record = report_record(self, title=title, **parts)
        return save_report(record, path, formats=formats or default_formats(), overwrite=overwrite)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "stages": [stage.to_dict() for stage in self.stages],
            "left_dense": dict(self.left_dense),
            "figures": {name: list(pair) for name, pair in self.figures.items()},
            "corrections": [correction.to_dict() for correction in self.corrections],
        }
