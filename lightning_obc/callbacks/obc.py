"""The callback that says *when* to compress. What to do is the pipeline's business, how is the engine's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union
from weakref import ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_obc.activations import attach, attached, detach
from lightning_obc.calibration import Collector
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.account import Account
from lightning_obc.callbacks.averaging import Averages
from lightning_obc.callbacks.beginning import Beginning
from lightning_obc.callbacks.display import Display, say
from lightning_obc.callbacks.figures import model_figures, stage_figures
from lightning_obc.callbacks.hazards import nothing_trained, unfinished, warn_hazards, warn_old_checkpoint
from lightning_obc.callbacks.passes import (
    check_destination,
    checked_plans,
    collector,
    edges,
    follow,
    references,
    whole_or_not,
)
from lightning_obc.callbacks.pictures import log_pictures
from lightning_obc.callbacks.recording import checkpoint_path, write_report
from lightning_obc.callbacks.state import RunState, foreign_state, state_key
from lightning_obc.callbacks.step_hooks import StepHooks
from lightning_obc.callbacks.timetable import (
    Timetable,
    any_of,
    at_epoch,
    at_plateau,
    at_step,
    at_train_end,
    at_train_start,
    at_validate,
    check_order,
    expand,
)
from lightning_obc.correction import DenseReference
from lightning_obc.correction_spec import Correct
from lightning_obc.layerwise import Edges
from lightning_obc.pipeline import correct_after
from lightning_obc.planning import check_execution, plan_stage
from lightning_obc.report import CompressionReport
from lightning_obc.report.histograms import histograms
from lightning_obc.report.tables import correction_table
from lightning_obc.specs import Calibration, Prune, Quantize, Stage
from lightning_obc.stage_run import run_stage
from lightning_obc.store import SolutionStore


class OBCCallback(Callback):
    """Compress a model with Optimal Brain Compression (arXiv 2208.11580) while, after or without training it.

    ``at`` of a stage says when it runs: ``"train_start"``, ``{"epoch": k}`` (before epoch ``k``, counted from 0),
    ``{"step": k}`` (after optimizer step ``k``), ``"train_end"``, ``"validate"`` (in ``trainer.validate``), or when a
    metric has stopped improving (:class:`~lightning_obc.schedules.Plateau`).

    The zeros of a pruned layer, and the grid of a quantized one, hold through every later optimizer step. State-dict
    keys never change: checkpoints load into the plain LightningModule, with or without this callback.

    Calibration data comes from ``calibration_dataloader()`` of the datamodule or the module, else from the train
    loader, and is drawn without disturbing the training. Batches go through ``calibration_step(batch)`` of the module
    if it has one, else through its ``forward``.

    With several processes (DDP, or ``ModelParallelStrategy`` with ``fully_shard``) calibration batches and layers
    are shared over ranks, and every rank gets the same bits. Other strategies are refused by name.

    Args:
        stages: What to do, in order: ``Prune``, ``Quantize`` and ``Correct`` stages.
        calibration: How much data to calibrate on.
        on_failure: ``"keep"`` leaves a layer that cannot be solved as it is and says so; ``"raise"`` stops at it.
        save_checkpoint: Write a checkpoint of the compressed model at the end: True puts ``compressed.ckpt`` beside
            the other checkpoints (or logs), a path puts it there, False writes none.
        compare: Measure the validation figures just before the first stage and after the last, and print them.
        verbose: Print the plan before, and the table after, each stage.
        save_report: Write the report beside that checkpoint: Markdown, JSON, and HTML with the extra ``report``.
        store: A folder that gets every solved layer at once. When the process is killed while a stage solves, the same
            run, started again or resumed, goes on behind the last solved layer, with the same result. One folder
            serves one run: delete it before another.
        check_calibration: Send one calibration batch through the model when a run begins, so that a call that the
            model does not take, and a layer that no batch reaches, end it then and not at their stage. It changes
            nothing. False for a model that cannot run before it has been trained.

    Raises:
        ScheduleError: Stages that cannot run in this order, or at these times. In a fit also when nothing was
            trained (no batch, no epoch), so that no stage ran.
    """

    def __init__(
        self,
        stages: list[Union[Prune, Quantize, Stage]],
        calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
        on_failure: Literal["keep", "raise"] = "keep",
        save_checkpoint: Union[bool, str, os.PathLike[str]] = True,
        compare: bool = True,
        verbose: bool = True,
        store: Optional[Union[str, Path]] = None,
        save_report: bool = True,
        check_calibration: bool = True,
    ) -> None:
        super().__init__()
        self.stages = list(stages)
        self.calibration = calibration
        self.on_failure: Literal["keep", "raise"] = on_failure
        self.save_checkpoint = save_checkpoint
        self.compare, self.verbose, self.store = compare, verbose, store
        self.save_report, self.check_calibration = save_report, check_calibration
        self.checkpoint_path: Optional[Path] = None
        self._state = self._fresh()
        self._module: Optional[ref[LightningModule]] = None
        self._hooks = StepHooks()
        self._averages, self._trained = Averages(), False
        self.ran = False
        self._edges: Optional[Edges] = None
        self._beginning = Beginning()
        self._account = Account()
        check_order(self._state.timetable.stages)

    def _fresh(self) -> RunState:
        return RunState(Timetable(expand(self.stages)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_module": None, "_averages": Averages()}

    # What users read.
    @property
    def report(self) -> Optional[CompressionReport]:
        """The report of the stages that have run, or None before the first one."""
        module = self._module() if self._module is not None else None
        if module is None or not self._state.reports:
            return None
        return self._account.report(module, self._state, self.stages)

    @property
    def stages_run(self) -> int:
        """Single steps of the recipe that have run on these weights; a gradual stage has several."""
        return len(self._state.timetable.done)

    @property
    def stages_left(self) -> list[Stage]:
        """Single steps of the recipe that belong to a training and have not run; empty behind a complete one."""
        return self._state.timetable.open()

    @property
    def final_figures(self) -> dict[str, float]:
        """Validation figures measured after the last stage, where ``compare`` asked for them."""
        return self._account.final(self._state)

    # State in checkpoints.
    @property
    def state_key(self) -> str:
        return state_key(self.stages)

    def state_dict(self) -> dict[str, Any]:
        return self._state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._forget()
        self._state.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        present = [callback.state_key for callback in compat.callbacks(trainer) if isinstance(callback, OBCCallback)]
        own = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if own is not None:
            if trainer.state.fn != TrainerFn.FITTING:
                warn_old_checkpoint(trainer, own, self.stages_run)
            return
        # The weights that are loaded now have not gone through what this callback did to others before.
        self._forget()
        state = foreign_state(checkpoint, present)
        if state is None:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self.load_state_dict(dict(state))
        else:
            # Nothing is resumed: another recipe starts on weights that carry zeros and grids already.
            self._state.load_layers(state)

    def _forget(self) -> None:
        """Start afresh; inputs that were quantized before are in floating point again."""
        module = self._module() if self._module is not None else None
        if module is not None:
            detach(module, self._state.inputs)
        self._state = self._fresh()

    # When.
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._module is not None and self._module() is not pl_module:
            # What was done to another model has not been done to this one.
            self._state, self._account = self._fresh(), Account()
        self._module, self._trained, self.ran = ref(pl_module), False, False
        compat.check_strategy(trainer)
        compat.behind_averaging(trainer, self)
        if stage == TrainerFn.FITTING and not compat.fast_dev_run(trainer):
            check_order(self._state.timetable.stages, max_epochs=trainer.max_epochs, max_steps=trainer.max_steps)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        attach(pl_module, self._state.inputs)
        left = self._state.timetable.open()
        self._edges = self._look(trainer, pl_module, left)
        checked_plans(trainer, pl_module, self, left, self._edges)
        if self.store is not None:
            SolutionStore(self.store)
        check_destination(self.save_checkpoint)

    def _look(self, trainer: Trainer, module: LightningModule, stages: list[Stage]) -> Optional[Edges]:
        return self._beginning.look(trainer, module, self.calibration, stages, trying=self.check_calibration)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        warn_hazards(trainer, self._state.timetable.open())
        self._state.held.bind(pl_module)
        self._averages.bind(trainer, self._state.held)
        self._hooks.attach(trainer, lambda touched: self._state.held.apply_(touched))
        self._run_due(trainer, pl_module, at_train_start)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averages.transferred_(self._state.held)
        self._averages.apply_()
        self._run_before_training(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Resumed behind the last batch of an epoch, Lightning starts the next one without its hook; and after an
        # interruption inside a stage, the step that it belongs to is over.
        self._beginning.look_at(trainer, pl_module, self.calibration, batch)
        self._run_before_training(trainer, pl_module)

    def _run_before_training(self, trainer: Trainer, module: LightningModule) -> None:
        over = at_epoch(trainer.current_epoch), at_step(trainer.global_step), self._at_plateau
        self._run_due(trainer, module, any_of(*over))

    def _at_plateau(self, stage: Stage) -> bool:
        return at_plateau(self._state.watch.reached)(stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Optimizers without hooks, and modules that edit their weights themselves.
        self._state.held.apply_()
        self._averages.apply_()
        self._run_due(trainer, pl_module, at_step(trainer.global_step))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averages.apply_()
        follow(trainer, self._state.timetable, self._state.watch, validation=False)
        figures = model_figures(pl_module, self._state.held.layers)
        figures |= {"obc/stage": float(len(self._state.timetable.done))}
        # Every rank has the same figures; their mean over ranks is what Lightning asks for at the end of an epoch.
        pl_module.log_dict(figures, sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averages.transferred_(self._state.held)
        everything = compat.fast_dev_run(trainer)
        due = any_of(at_train_end, self._at_plateau)
        self._run_due(trainer, pl_module, (lambda _: True) if everything else due)
        if self.stages_left:
            rank_zero_warn(unfinished(trainer, self.stages_left))
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left = self._state.timetable.open()
        if left and not self._trained and compat.is_trained(trainer):
            # Interrupted between the last optimizer step and the end of the stages: Lightning resumes such a run
            # without any hook of the training.
            with compat.on_device(trainer):
                self._state.held.bind(pl_module)
                self.on_train_end(trainer, pl_module)
        elif left and not trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            raise nothing_trained(trainer, left)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranges of a checkpoint that was loaded since; where they are attached already, nothing happens.
        attach(pl_module, self._state.inputs)
        if trainer.state.fn == TrainerFn.VALIDATING:
            timetable = self._state.timetable
            due = [timetable.stages[index] for index in timetable.due(at_validate, fitting=False)]
            self._edges = self._look(trainer, pl_module, due)
            if due:
                check_destination(self.save_checkpoint)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            before = len(self._state.timetable.done)
            self._run_due(trainer, pl_module, at_validate, fitting=False)
            if len(self._state.timetable.done) > before:
                self._finish(trainer, pl_module)
        elif not trainer.sanity_checking:
            follow(trainer, self._state.timetable, self._state.watch, validation=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hooks.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hooks.detach()
        self._state.held.unbind()
        self._averages.unbind()

    # What happens then.
    def _run_due(
        self, trainer: Trainer, module: LightningModule, is_due: Callable[[Stage], bool], *, fitting: bool = True
    ) -> None:
        due = self._state.timetable.due(is_due, fitting=fitting)
        if not due:
            return
        self.ran = True
        stages = {index: self._state.timetable.stages[index] for index in due}
        # Hooks of trainer.validate run in inference mode; its tensors would poison a later fit.
        with torch.inference_mode(False), torch.no_grad(), Display(trainer) as display:
            if not self._state.timetable.started:
                self._account.open(trainer, module, self._state, compare=self.compare)
            collect = collector(trainer, module, self.calibration, display)
            check_execution(module, list(stages.values()), self.calibration)
            if self._edges is None:
                self._edges = edges(trainer, module, self.calibration, list(stages.values()))
            with collect.executing():
                dense = dict(zip(due, references(collect, list(stages.values())), strict=True))
            self._state.expect(module, list(stages.values()), self._edges)
            for index, stage in stages.items():
                figures: dict[str, float] = {}
                whole = whole_or_not(module, stage, self.calibration)
                with whole, self._state.whole_or_not(), collect.executing():
                    if isinstance(stage, Correct):
                        self._correct(module, stage, collect, dense[index])
                    else:
                        figures = self._compress(module, index, collect, display)
                self._state.finish(index)
                self._averages.restart_(trainer, module, self._state.held)
                if not isinstance(stage, Correct):
                    log_pictures(trainer, module, self._state.reports[-1])
                self._log(trainer, {**figures, **model_figures(module, self._state.held.layers)})
            self._state.origins.forget()

    def _compress(self, module: LightningModule, index: int, collect: Collector, display: Display) -> dict[str, float]:
        stage = self._state.timetable.stages[index]
        plan = plan_stage(module, stage, self.calibration, self._edges)
        self._state.plans.append(str(plan))
        if self.verbose:
            say(module, f"\n{plan}")
        store = None if self.store is None else SolutionStore(self.store).stage(index)
        options: dict[str, Any] = {"on_failure": self.on_failure, "progress": display.update, "plan": plan}
        report = run_stage(module, stage, collect, store=store, origins=self._state.origins, **options)
        for layer in plan.layers:
            if layer.name in report.solutions:
                self._state.held.hold(layer.name, layer.module, layer.stage, report.solutions[layer.name])
        found = {name: grid for name, grid in attached(module).items() if name in report.activations}
        self._state.inputs = self._state.inputs | found
        self._state.reports.append(report)
        self._state.histograms = self._state.histograms | histograms(report.solutions, self._state.samples)
        if self.verbose:
            say(module, f"\n{report.table()}")
        return stage_figures(report)

    def _correct(
        self, module: LightningModule, stage: Correct, collect: Collector, dense: Optional[DenseReference]
    ) -> None:
        options: dict[str, Any] = {"dense": dense, "forward": collect.forward, "progress": collect.progress}
        options["ranks"] = collect.ranks
        reports = self._state.reports
        report = correct_after(module, stage, collect.batches, reports, on_failure=self.on_failure, **options)
        self._state.held.apply_()
        self._state.corrections.append(report)
        if self.verbose:
            say(module, f"\n{correction_table(report)}")

    def _log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        # One point per stage on the step axis; self.log would average the stages of one epoch, and is not allowed in
        # half of these hooks.
        values = {**values, "obc/stage": float(len(self._state.timetable.done))}
        compat.log_now(trainer, values)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare with the dense model and write the checkpoint, if anything was compressed."""
        if not self._state.timetable.started:
            return
        if self.compare:
            compressed = self._account.close(trainer, module, self._state)
            self._log(trainer, {f"obc/{name}": value for name, value in compressed.items()})
        if self.save_checkpoint and not compat.fast_dev_run(trainer):
            self.checkpoint_path = compat.same_path(trainer, checkpoint_path(trainer, self.save_checkpoint))
            trainer.save_checkpoint(self.checkpoint_path, weights_only=False)
            say(module, f"compressed checkpoint: {self.checkpoint_path}")
            if self.save_report and trainer.is_global_zero and self.report is not None:
                written = write_report(self.report, self.checkpoint_path, self.calibration)
                formats = ", ".join(path.suffix.lstrip(".") for path in written[1:])
                say(module, f"report: {written[0] if written else 'none'}" + (f" (and {formats})" if formats else ""))
