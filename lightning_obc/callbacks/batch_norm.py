"""``BatchNormReset``: running statistics of batch-norm, measured anew at chosen times."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_obc.callbacks.display import Display, say
from lightning_obc.callbacks.passes import collector
from lightning_obc.correction import CorrectionReport, reset_batch_norm
from lightning_obc.correction.batch_norm import tracking_layers
from lightning_obc.correction.norms import norm_layers
from lightning_obc.errors import SpecError, StrategyError
from lightning_obc.report.tables import correction_table
from lightning_obc.specs import Calibration

Time = Union[str, dict[str, int]]

_NAMES = ("train_start", "validation", "train_end", "validate")


class BatchNormReset(Callback):
    """Measure the running statistics of batch-norm layers anew, from calibration data, at chosen times.

    Weights that were changed by hand, averaged, pruned or quantized leave statistics behind that no longer fit them.
    Inside a recipe, ``Correct("batch_norm")`` does the same as a stage; this callback is for all other models, and for
    times that are no stage's. Only running means and variances change; training itself does not see them.

    Args:
        at: One time or several: ``"validation"`` (before every validation of a fit, so that scores and checkpoints are
            of the new statistics), ``{"epoch": k}`` (before epoch ``k``, counted from 0), ``"train_start"``,
            ``"train_end"`` or ``"validate"`` (before the figures of ``trainer.validate`` are measured).
        calibration: How much data to use; sources are those of :class:`~lightning_obc.OBCCallback`.
        momentum: None averages over all batches, which is exact; a number weighs the newest batch.
        layers: Names, globs or types of norm layers; None means all that track running statistics.
        exclude: Entries of the same kinds to leave out.
        verbose: Print how far the statistics of each layer have moved.

    Raises:
        SpecError: A time that is not known. StrategyError: The Trainer runs several processes.
    """

    def __init__(
        self,
        at: Union[str, dict[str, int], list[Time]] = "train_end",
        calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
        momentum: Optional[float] = None,
        layers: Optional[list[str]] = None,
        exclude: Optional[list[str]] = None,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.at: list[Time] = list(at) if isinstance(at, list) else [at]
        for time in self.at:
            _check_time(time)
        self.calibration, self.momentum, self.verbose = calibration, momentum, verbose
        self.layers, self.exclude = layers, exclude
        self.report: Optional[CorrectionReport] = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise StrategyError(
                "BatchNormReset works on one device",
                got=f"{trainer.world_size} processes",
                expected="a single one, or every process would measure statistics of its own",
                remedy='use the stage Correct("batch_norm"), or Trainer(devices=1)',
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A model without such layers, or a misspelt name, is said before anything runs.
        tracking_layers(norm_layers(pl_module, self.layers, self.exclude))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset_at("train_start", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset_at({"epoch": trainer.current_epoch}, trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._reset_at("validate", trainer, pl_module)
        elif not trainer.sanity_checking:
            self._reset_at("validation", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset_at("train_end", trainer, pl_module)

    def _reset_at(self, time: Time, trainer: Trainer, module: LightningModule) -> None:
        if time not in self.at:
            return
        # Hooks of trainer.validate run in inference mode; its tensors would poison a later fit.
        with torch.inference_mode(False), torch.no_grad(), Display(trainer) as display:
            collect = collector(trainer, module, self.calibration, display)
            options: dict[str, Any] = {"layers": self.layers, "exclude": self.exclude, "momentum": self.momentum}
            self.report = reset_batch_norm(
                module,
                collect.batches,
                batches_limit=None,
                forward=collect.forward,
                progress=display.update,
                **options,
            )
        if self.verbose:
            say(module, f"\n{correction_table(self.report)}")


def _check_time(time: Any) -> None:
    if isinstance(time, str) and time in _NAMES:
        return
    if isinstance(time, dict) and list(time) == ["epoch"]:
        epoch = time["epoch"]
        if isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0:
            return
    raise SpecError(
        "A time of BatchNormReset cannot be read",
        got=repr(time),
        expected=f'{", ".join(map(repr, _NAMES))} or {{"epoch": k}} with k >= 0',
    )
