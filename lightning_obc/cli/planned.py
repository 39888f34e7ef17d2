"""``--plan``: what a run would do to the model, printed in the place of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display, say
from lightning_obc.callbacks.passes import collector
from lightning_obc.errors import LayerNotReachedError
from lightning_obc.forecast import Plan, plan
from lightning_obc.layerwise import reached_edges
from lightning_obc.planning import check_schedule, plan_stage
from lightning_obc.rehearsal import rehearse
from lightning_obc.schedules import times
from lightning_obc.specs import Calibration, Prune, Stage


class PlanRun(Callback):
    """Prints the plan of stages once model, checkpoint and data are there, and ends the run before its first batch."""

    def __init__(self, stages: Sequence[Stage], calibration: Calibration) -> None:
        self.stages, self.calibration = list(stages), calibration
        self.plan: Plan | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad(), Display(trainer) as display:
            collect = collector(trainer, module, self.calibration, display)
            options: dict[str, Any] = {"calibration": self.calibration, "forward": collect.forward}
            reached = reached_edges(module, self.stages, lambda: collect)
            check_schedule(module, self.stages, reached)
            # The same look at the data as that of a run.
            rehearse(collect, [plan_stage(module, stage, self.calibration, reached) for stage in self.stages])
            try:
                self.plan = plan(module, self.stages, next(iter(collect.batches)), **options)
            except LayerNotReachedError:
                # Later batches reach all layers; the time of their calibration stays open.
                self.plan = plan(module, self.stages, **options)
        say(module, f"{self.plan}\n\n{timetable(self.stages)}\nplan only: nothing was run, changed or written")
        compat.end_run()


def timetable(stages: Sequence[Stage]) -> str:
    """When each stage runs, one line for each, steps of a gradual schedule included."""
    return "\n".join(f"{number}. {_when(stage)}: {stage}{_steps(stage)}" for number, stage in enumerate(stages, 1))


def _when(stage: Stage) -> str:
    named = {
        "train_start": "before the first epoch",
        "train_end": "after the last epoch",
        "validate": "after the validation of the dense model",
    }
    if isinstance(stage.at, str):
        return named[stage.at]
    for unit, number in times(stage.at):
        return f"before epoch {number}, counted from 0" if unit == "epoch" else f"after optimizer step {number}"
    return f"at the {stage.at}"


def _steps(stage: Stage) -> str:
    if not isinstance(stage, Prune) or stage.schedule is None:
        return ""
    steps = stage.steps()
    levels = ", ".join(f"{100 * getattr(step.parsed, 'sparsity', 0.0):.3g} %" for step in steps)
    (unit, last) = next(iter(times(steps[-1].at)))
    return f", in {len(steps)} steps to {unit} {last}: {levels} (the estimate is of one step)"
