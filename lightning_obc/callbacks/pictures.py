"""A stage as pictures in TensorBoard, where that is the logger; other loggers get the numbers alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_obc.callbacks import compat
from lightning_obc.errors import MissingExtraError
from lightning_obc.files import require
from lightning_obc.layers import adapter_for, select_layers
from lightning_obc.metrics.functional import whole
from lightning_obc.report import StageReport

_MOST_LAYERS = 60


def log_pictures(trainer: Trainer, model: nn.Module, report: StageReport) -> None:
    """Relative error and sparsity of every layer of a stage as one figure, and the weights as histograms.

    The figure needs matplotlib; without it a warning says so, once, and the histograms are there all the same.
    """
    loggers: list[Any] = list(trainer.loggers)
    writers = [logger.experiment for logger in loggers if _is_tensorboard(logger)]
    if not writers:
        return
    step = compat.logged_step(trainer)
    figure = _figure(report)
    layers = select_layers(model)
    for writer in writers:
        if figure is not None:
            writer.add_figure(f"obc/{report.stage}", figure, step)
        for row in report.layers:
            adapter = adapter_for(layers[row.name]) if row.name in layers else None
            if row.compressed and adapter is not None:
                weight = whole(adapter.current(layers[row.name])).float().cpu()
                writer.add_histogram(f"obc_weights/{row.name}", weight, step)


def _is_tensorboard(logger: Any) -> bool:
    return type(logger).__name__ == "TensorBoardLogger" and hasattr(logger.experiment, "add_histogram")


def _figure(report: StageReport) -> Any:
    """Two columns of bars, one row per layer; of a large model the layers with the largest errors."""
    try:
        figures = require("matplotlib.figure", "tensorboard")
    except MissingExtraError as error:
        rank_zero_warn(f"No figures in TensorBoard. {error}")
        return None
    rows = sorted(report.layers, key=lambda row: -row.relative_error)[:_MOST_LAYERS]
    rows = [row for row in report.layers if row in rows]
    figure = figures.Figure(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    places = range(len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [100 * row.relative_error for row in rows], color="#2563eb")
    left.set(xlabel="relative output error [%]", yticks=list(places), yticklabels=[row.name for row in rows])
    left.invert_yaxis()
    right.barh(places, [100 * row.sparsity for row in rows], color="#d97706")
    right.set(xlabel="zeros [%]", xlim=(0, 100))
    for place, row in zip(places, rows, strict=True):
        right.annotate(f"{row.bits} bits", (2, place), va="center", fontsize=8)
    left_out = len(report.layers) - len(rows)
    figure.suptitle(report.stage + (f" ({left_out} layers of smaller error left out)" if left_out else ""))
    return figure
