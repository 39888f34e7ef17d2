"""The Trainer of the command line: everything that LightningCLI can call as a subcommand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_obc.allocation import SPDY, Recipe, SearchResult
from lightning_obc.allocation.curve import Method
from lightning_obc.callbacks import OBCCallback
from lightning_obc.cli.ahead import LookAhead, check_output
from lightning_obc.cli.checkpoints import loading
from lightning_obc.cli.exporting import Exported, ExportOptions, ExportRun, Format, LinearKernel, format_of
from lightning_obc.cli.planned import PlanRun
from lightning_obc.cli.recipes import Applied, RecipeRun
from lightning_obc.cli.search_options import Levels, SearchOptions
from lightning_obc.cli.searching import SearchRun
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import ScheduleError
from lightning_obc.specs import ActivationGrid, Calibration, Prune, Quantize, Stage


class OBCTrainer(Trainer):
    """A Trainer that can also compress a model without training it, and say beforehand what it would do."""

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        ckpt_path: Optional[Union[str, Path]] = None,
        weights_only: Optional[bool] = None,
        plan: bool = False,
    ) -> None:
        """Train a model, with the stages of an ``OBCCallback`` where there is one.

        Args:
            model: The model.
            train_dataloaders: Training data, when there is no datamodule.
            val_dataloaders: Validation data, when there is no datamodule.
            datamodule: Training, validation and calibration data.
            ckpt_path: Checkpoint of a run to resume.
            weights_only: Passed on to ``Trainer.fit``.
            plan: Print what the stages would do, their memory and time, and stop before anything runs.

        Raises:
            ScheduleError: A plan is asked for, and there are no stages.
        """
        data: Any = {"datamodule": datamodule, "ckpt_path": ckpt_path, "weights_only": weights_only}
        if not plan:
            super().fit(model, train_dataloaders, val_dataloaders, **data)
            return
        with self._planning(*_recipe(self.own_callbacks, None, None)):
            super().fit(model, train_dataloaders, val_dataloaders, **data)

    def compress(
        self,
        model: LightningModule,
        dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        ckpt_path: Optional[str] = None,
        stages: Optional[list[Union[Prune, Quantize, Stage]]] = None,
        calibration: Optional[Calibration] = None,
        on_failure: Optional[Literal["keep", "raise"]] = None,
        output: Union[bool, str] = True,
        store: Optional[str] = None,
        weights_only: Optional[bool] = None,
        plan: bool = False,
    ) -> Optional[OBCCallback]:
        """Compress a trained model in one validation run, and compare it with the dense one.

        Args:
            model: The model; its weights come from ``ckpt_path`` when that is given.
            dataloaders: Validation data, when there is no datamodule.
            datamodule: Validation and calibration data.
            ckpt_path: Checkpoint with the trained weights.
            stages: What to do, in order; ``at`` is ignored. By default the stages of the ``OBCCallback`` among the
                Trainer's callbacks, so that the configuration of a training run serves here too.
            calibration: How much data to calibrate on; by default that of the ``OBCCallback`` when the stages are its
                own, else ``Calibration()``.
            on_failure: ``"keep"`` leaves a layer that cannot be solved as it is and says so (the default);
                ``"raise"`` stops at it.
            output: Where the compressed checkpoint goes: true for ``compressed.ckpt`` among the logs, a path, or false.
            store: A folder that gets every solved layer at once: the same command goes on there after an interruption.
                By default that of the ``OBCCallback`` when the stages are its own.
            weights_only: Passed on to ``Trainer.validate``.
            plan: Print what the stages would do, their memory and time, and stop before anything runs.

        Returns:
            The callback that did the work; its ``report`` holds the figures. None for a plan.

        Raises:
            ScheduleError: There are no stages, neither here nor in a callback; or none ran.
        """
        if plan:
            stages, calibration = _recipe(self.own_callbacks, stages, calibration)
            with loading(ckpt_path), self._planning([_at_validate(stage) for stage in stages], calibration):
                self.validate(model, dataloaders, ckpt_path, datamodule=datamodule, weights_only=weights_only)
            return None
        check_output(output, ckpt_path)
        callback = _validating(self.own_callbacks, stages, calibration, on_failure, output, store)
        with loading(ckpt_path), self._instead_of_own(callback):
            self.validate(
                model, dataloaders, ckpt_path, verbose=False, datamodule=datamodule, weights_only=weights_only
            )
        if not callback.ran:
            behind = f"a checkpoint that has {callback.stages_run} of these stages behind it"
            raise ScheduleError(
                "Nothing was compressed",
                got=behind if callback.stages_run else "no validation, at whose end the stages run",
                expected="a dense checkpoint, validation data, and stages that have not run",
                remedy="choose the dense checkpoint or other stages; lightning-obc validate and export take this one",
            )
        return callback

    def search(
        self,
        model: LightningModule,
        dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        ckpt_path: Optional[str] = None,
        budgets: Sequence[float] = (0.5, 0.25, 0.125),
        cost: str = "bops",
        levels: Optional[Levels] = None,
        metric: Optional[str] = None,
        mode: Literal["max", "min"] = "max",
        methods: list[Method] = ["uniform", "dp", "spdy"],  # noqa: B006 (a list, so that YAML can write it; only read)
        scores: Literal["error", "sensitivity", "loss"] = "sensitivity",
        correct: Optional[Correct] = None,
        calibration: Optional[Calibration] = None,
        spdy: Optional[SPDY] = None,
        solve: Optional[Recipe] = None,
        activations: Optional[ActivationGrid] = None,
        layers: Optional[list[str]] = None,
        exclude: Optional[list[str]] = None,
        edges_at_8: bool = False,
        mask_cost: bool = False,
        threads: int = 1,
        database: Optional[str] = None,
        output: Optional[str] = None,
        overwrite: bool = False,
        train: bool = False,
        weights_only: Optional[bool] = None,
        linear: LinearKernel = "dequantize",
    ) -> SearchResult:
        """Search the best level of every layer under budgets, and write curve, recipes, checkpoints and reports.

        Args:
            model: The model; its weights come from ``ckpt_path`` when that is given. Dense again afterwards.
            dataloaders: Validation data, when there is no datamodule.
            datamodule: Validation and calibration data.
            ckpt_path: Checkpoint with the trained weights.
            budgets: Shares of the dense model's cost, in (0, 1].
            cost: ``flops``, ``bops``, ``bytes``; ``seconds``, measured for each layer in ONNX Runtime on this machine;
                or the JSON file of a latency table.
            levels: Levels to choose from; by default some that suit the cost.
            metric: Name of the validation figure to judge by; may be left out when the model logs only one.
            mode: Whether large (``max``) or small (``min``) figures are good. With ``min`` tables show the negative.
            methods: ``uniform`` (one level for all layers), ``dp`` (dynamic programme), ``spdy``.
            scores: What the dynamic programme adds up: relative layer errors, the same scaled by sensitivity, or the
                increase of the calibration loss by every single level.
            correct: A correction after every stitching; its ``at`` is ignored.
            calibration: How much data to calibrate on.
            spdy: Extent of SPDY's search.
            solve: How levels are solved.
            activations: How activation ranges are found; its ``bits`` are those of the levels.
            layers: Names, globs or type names; by default every supported layer.
            exclude: Names, globs or type names that stay dense.
            edges_at_8: The first and the last layer take no level below 8 bits.
            mask_cost: BOPs count one bit operation for each masked weight.
            threads: Threads of ONNX Runtime where time is measured.
            database: Folder of the database of levels, to be gone on with; by default it is not kept.
            output: Folder for what is written; by default ``search`` among the logs.
            overwrite: Write over the results of another search in that folder.
            train: Train the model first; not when there is a ``ckpt_path``.
            weights_only: Passed on to ``Trainer.validate``.
            linear: Where time is measured: how linear layers with quantized weights will be exported
                (``export --linear``).

        Returns:
            The trade-off curve.

        Raises:
            BudgetError, SpecError: Budgets, costs or figures that cannot be used.
            CalibrationError, LayerNotFoundError, LayerNotReachedError: As when a compression begins; with ``train``
                before the training.
            ExportError: The folder holds the results of another search.
        """
        options = SearchOptions(
            budgets=list(budgets),
            cost=cost,
            levels=levels,
            metric=metric,
            mode=mode,
            methods=methods,
            scores=scores,
            correct=correct,
            calibration=calibration or Calibration(),
            spdy=spdy,
            solve=solve or Recipe(),
            activations=activations,
            layers=layers,
            exclude=exclude,
            edges_at_8=edges_at_8,
            mask_cost=mask_cost,
            threads=threads,
            database=database,
            output=output,
            linear=linear,
            overwrite=overwrite,
        )
        options.check()
        run = SearchRun(options)
        if train and ckpt_path is None:
            with self._instead_of_own(LookAhead(options.look, run.figures)):
                self.fit(model, datamodule=datamodule)
        self._validate_with(run, model, dataloaders, datamodule, ckpt_path, weights_only)
        assert run.result is not None
        return run.result

    def apply(
        self,
        model: LightningModule,
        recipe: str,
        dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        ckpt_path: Optional[str] = None,
        output: Union[bool, str] = True,
        weights_only: Optional[bool] = None,
    ) -> Applied:
        """Run a recipe of ``search`` on a dense model: calibrate, solve its levels, stitch, correct, and measure.

        Args:
            model: The model; its weights come from ``ckpt_path`` when that is given.
            recipe: YAML file that a search has written.
            dataloaders: Validation data, when there is no datamodule.
            datamodule: Validation and calibration data.
            ckpt_path: Checkpoint with the dense weights.
            output: Where the compressed checkpoint goes: true for the recipe's name among the logs (never over
                a file that is there), a path, or false.
            weights_only: Passed on to ``Trainer.validate``.

        Returns:
            Figures before and after, and where the checkpoint is.

        Raises:
            SpecError: The recipe cannot be read. LayerNotFoundError, PatternError: The model cannot have its levels.
        """
        check_output(output, ckpt_path)
        run = RecipeRun(Path(recipe), output)
        self._validate_with(run, model, dataloaders, datamodule, ckpt_path, weights_only)
        assert run.result is not None
        if run.result.checkpoint is not None:
            print(f"compressed checkpoint: {run.result.checkpoint}")
        return run.result

    def export(
        self,
        model: LightningModule,
        path: str,
        dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        ckpt_path: Optional[str] = None,
        format: Optional[Format] = None,
        integer: bool = False,
        activation_bits: int = 8,
        calibration: Optional[Calibration] = None,
        dynamic_batch: bool = True,
        overwrite: bool = False,
        weights_only: Optional[bool] = None,
        linear: LinearKernel = "dequantize",
        shrink: bool = False,
    ) -> Exported:
        """Write a compressed checkpoint as a file that other tools run, after validating it.

        Masks, codes and scales are those of the run that wrote the checkpoint. A checkpoint that was never compressed
        becomes a floating-point file.

        Args:
            model: The model; its weights come from ``ckpt_path`` when that is given.
            path: The file; for ``compressed-tensors`` a folder, made if need be.
            dataloaders: Validation data, when there is no datamodule.
            datamodule: Validation and calibration data; a calibration batch is the example input, which ONNX and
                ``shrink`` need.
            ckpt_path: The compressed checkpoint.
            format: ``onnx``, ``packed`` (safetensors with masks and codes at their own bit width), or
                ``compressed-tensors`` (quantized linear layers in the layout of that package, a folder). By default
                what the ending of the path says: ``.onnx``, or ``.safetensors`` for packed.
            integer: ONNX: quantize every tensor between quantized layers, by ranges on the calibration data, so that
                integer kernels run. Otherwise only inputs whose ranges the checkpoint of a search holds.
            activation_bits: ONNX: 8, or 7 for CPUs without VNNI.
            calibration: How much data to measure ranges on.
            dynamic_batch: ONNX: leave the batch dimension open.
            overwrite: Replace existing files.
            weights_only: Passed on to ``Trainer.validate``.
            linear: ONNX: ``packed`` lets linear layers compute from codes of 4 bits as they are, ``packed-int8`` in
                integers too, for ONNX Runtime alone (see :func:`lightning_obc.export_onnx`).
            shrink: ONNX and packed: take channels that no row reads out of the layers first (``lightning_obc.shrink``),
                as ``Prune(Structured(…))`` leaves them.

        Returns:
            What was written.

        Raises:
            ExportError: The file exists, or the model cannot be exported. FingerprintError: The checkpoint's
                compression belongs to another model. MissingExtraError: ONNX without the extra ``onnx``.
        """
        target, calibration = Path(path), calibration or Calibration()
        options = ExportOptions(
            path=target,
            format=format or format_of(target),
            integer=integer,
            activation_bits=activation_bits,
            calibration=calibration,
            dynamic_batch=dynamic_batch,
            overwrite=overwrite,
            linear=linear,
            shrink=shrink,
        )
        options.check()
        run = ExportRun(options)
        self._validate_with(run, model, dataloaders, datamodule, ckpt_path, weights_only)
        assert run.result is not None
        notes = [f"  {note}" for note in run.result.notes]
        size = f"{run.result.size / 2**20:.3f} MiB, {len(run.result.layers)} compressed layers"
        print("\n".join([f"{run.result.path}: {size}", *notes]))
        return run.result

    @property
    def own_callbacks(self) -> list[OBCCallback]:
        """The compression callbacks of the configuration."""
        return [callback for callback in vars(self)["callbacks"] if isinstance(callback, OBCCallback)]

    @contextmanager
    def _instead_of_own(self, *callbacks: Callback) -> Iterator[None]:
        """Other callbacks in the place of the configuration's own OBCCallback."""
        saved, own = vars(self)["callbacks"], self.own_callbacks
        self.callbacks = [callback for callback in saved if callback not in own] + list(callbacks)
        try:
            yield
        finally:
            self.callbacks = saved

    @contextmanager
    def _planning(self, stages: Sequence[Stage], calibration: Calibration) -> Iterator[None]:
        """Only the plan in the place of all callbacks; nothing is logged or written, and no bar is drawn."""
        saved = vars(self)["callbacks"], self.loggers
        self.callbacks, self.loggers = [PlanRun(stages, calibration)], []
        try:
            yield
        finally:
            self.callbacks, self.loggers = saved

    def _validate_with(
        self,
        callback: Callback,
        model: LightningModule,
        dataloaders: Any,
        datamodule: Optional[LightningDataModule],
        ckpt_path: Optional[str],
        weights_only: Optional[bool],
    ) -> None:
        with loading(ckpt_path), self._instead_of_own(callback):
            self.validate(model, dataloaders, ckpt_path, datamodule=datamodule, weights_only=weights_only)


def _recipe(
    present: Sequence[OBCCallback], stages: Optional[Sequence[Stage]], calibration: Optional[Calibration]
) -> tuple[list[Stage], Calibration]:
    """The given stages, or those of the Trainer's own callback, and how to calibrate."""
    if stages is None and len(present) == 1:
        stages, calibration = present[0].stages, calibration or present[0].calibration
    if not stages:
        raise ScheduleError(
            "There is nothing to compress with",
            got=f"no stages, {len(present)} OBCCallbacks",
            expected="stages, or one OBCCallback in trainer.callbacks",
            remedy="write stages in the configuration, or --stages on the command line",
        )
    return list(stages), calibration or Calibration()


def _validating(
    present: Sequence[OBCCallback],
    stages: Optional[Sequence[Stage]],
    calibration: Optional[Calibration],
    on_failure: Optional[Literal["keep", "raise"]],
    output: Union[bool, str],
    store: Optional[str],
) -> OBCCallback:
    """A callback that runs the given stages, or those of the Trainer's own callback as it is set, during validation."""
    own: dict[str, Any] = {}
    if stages is None and len(present) == 1:
        names = ("on_failure", "store", "compare", "verbose", "save_report", "check_calibration")
        own = {name: getattr(present[0], name) for name in names}
    given = {name: value for name, value in {"on_failure": on_failure, "store": store}.items() if value is not None}
    recipe, calibration = _recipe(present, stages, calibration)
    return OBCCallback(
        [_at_validate(stage) for stage in recipe], calibration, save_checkpoint=output, **{**own, **given}
    )


def _at_validate(stage: Any) -> Stage:
    changes: dict[str, Any] = {"at": "validate"}
    if isinstance(stage, Prune):
        changes["schedule"] = None
    return replace(stage, **changes)
