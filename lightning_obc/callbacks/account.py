"""What a run measures around its stages, dense against compressed, and the report that it makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import say
from lightning_obc.callbacks.figures import comparison, model_figures
from lightning_obc.callbacks.recording import when
from lightning_obc.callbacks.state import RunState
from lightning_obc.layers import unsupported_layers
from lightning_obc.report import CompressionReport, weight_samples
from lightning_obc.specs import Stage


class Account:
    """The part of a run that no checkpoint keeps: figures of the compressed model.

    Attributes:
        figures: Validation figures by name, dense and compressed.
    """

    def __init__(self) -> None:
        self.figures: dict[str, tuple[float, float]] = {}
        self._notes: list[str] = []
        self._final, self._final_stage = dict[str, float](), -1

    def open(self, trainer: Trainer, module: LightningModule, state: RunState, *, compare: bool) -> None:
        """Just before the first stage: sample the dense weights and, if asked to, measure the dense model."""
        state.samples = weight_samples(module)
        state.dense_when = f"just before the first stage ({when(trainer)})"
        state.dense_step = trainer.global_step
        if compare:
            state.dense = compat.evaluate(trainer)

    def close(self, trainer: Trainer, module: LightningModule, state: RunState) -> dict[str, float]:
        """Behind the last stage: measure the compressed model, print the comparison, and return its figures."""
        with torch.inference_mode(False), torch.no_grad():
            compressed = compat.evaluate(trainer)
        self._final, self._final_stage = compressed, len(state.timetable.done)
        self.figures = {name: (state.dense[name], value) for name, value in compressed.items() if name in state.dense}
        ratio = model_figures(module, state.held.layers)["obc/compression_ratio"]
        trained = trainer.global_step - state.dense_step
        now = f"after the last stage ({when(trainer)})" + (f", {trained} optimizer steps later" if trained else "")
        self._notes = [f"dense: {state.dense_when}", f"compressed: {now}"]
        say(module, "\n" + comparison(state.dense, compressed, (state.dense_when, now), ratio))
        return compressed

    def final(self, state: RunState) -> dict[str, float]:
        """Figures of the compressed model, if no stage has run since they were measured."""
        return dict(self._final) if self._final_stage == len(state.timetable.done) else {}

    def report(self, module: LightningModule, state: RunState, recipe: Sequence[Stage]) -> CompressionReport:
        """The report of the stages that have run."""
        return CompressionReport(
            module,
            list(state.reports),
            unsupported_layers(module),
            dict(self.figures),
            list(state.corrections),
            recipe=recipe,
            plans=list(state.plans),
            dense=state.samples,
            notes=self._notes,
            histograms=state.histograms,
        )
