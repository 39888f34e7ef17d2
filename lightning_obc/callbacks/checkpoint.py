"""``CompressedCheckpoint``: a ModelCheckpoint whose best file always has what the last stage made."""

from __future__ import annotations

from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_obc.callbacks import compat
from lightning_obc.callbacks.stages import final_figures, stages_run


class CompressedCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` whose competition starts anew whenever a compression stage has run.

    The dense network usually scores best, so that an ordinary ``ModelCheckpoint(monitor=…)`` keeps it as its best, and
    ``trainer.test(ckpt_path="best")`` brings it back. Here only checkpoints from behind the last stage of every
    ``OBCCallback`` compete:

    * Score and weights of a file belong together: a score that was measured before the last stage is never used.
    * When stages ran at the end of training, a last file is written with their result and its own score.
    * File names carry the number of stages that had run, ``{stage}``, as do the names that ``filename`` asks for it.

    Args:
        dirpath: Folder of the files; as for ``ModelCheckpoint``.
        filename: Template of their names, which may use ``{stage}``; None means ``{epoch}-{step}-{stage}``.
        monitor: Metric to compete by; None keeps the last file.
        mode: ``"min"`` when smaller is better, ``"max"`` when larger is.
        save_top_k: Files to keep of the present competition; -1 keeps all.
        keep_earlier: Also keep the winners from before a stage; False removes them once the first file from behind the
            stage is there.
        kwargs: Everything else that ``ModelCheckpoint`` takes.
    """

    def __init__(
        self,
        dirpath: Optional[str] = None,
        filename: Optional[str] = None,
        monitor: Optional[str] = None,
        mode: str = "min",
        save_top_k: int = 1,
        keep_earlier: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename or "{epoch}-{step}-{stage}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            **kwargs,
        )
        self.keep_earlier = keep_earlier
        self.stage = 0
        self._is_new_score = True
        self._by_validation: Optional[bool] = None
        self._epoch_stage = self._validation_stage = 0
        self._earlier: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        own = {"stage": self.stage, "new_score": self._is_new_score, "earlier": list(self._earlier)}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.stage = int(state_dict["stage"])
        self._is_new_score, self._earlier = bool(state_dict["new_score"]), list(state_dict["earlier"])

    # Lightning calls checkpoint callbacks last: stages of the same hook have run already.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._follow(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer)
        self._epoch_stage = self.stage

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._tidy(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer)
        self._validation_stage = self.stage

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._by_validation = self.monitor in compat.validation_metrics(trainer)
            self._is_new_score |= self._by_validation and self._validation_stage == self.stage
        super().on_validation_end(trainer, pl_module)
        self._tidy(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer)
        # A mean over the epoch is of one model only when no stage ran within it.
        self._is_new_score |= not self._by_validation and self._epoch_stage == self.stage
        super().on_train_epoch_end(trainer, pl_module)
        self._tidy(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)
        super().on_train_end(trainer, pl_module)
        if self.stage and self.best_model_path:
            score = "" if self.best_model_score is None else f" ({self.monitor} {float(self.best_model_score):.4g})"
            rank_zero_info(f"Best checkpoint from behind the last stage{score}: {self.best_model_path}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Stages that a resumed run, already at its last epoch, makes up for.
        if self.stage != stages_run(trainer):
            with compat.on_device(trainer):
                self._finish(trainer)

    # What ModelCheckpoint asks.
    def check_monitor_top_k(self, trainer: Trainer, current: Optional[Tensor] = None) -> bool:
        return self._is_new_score and super().check_monitor_top_k(trainer, current)

    def format_checkpoint_name(
        self,
        metrics: dict[str, Tensor],
        filename: Optional[str] = None,
        ver: Optional[int] = None,
        prefix: Optional[str] = None,
    ) -> str:
        return super().format_checkpoint_name(metrics | {"stage": torch.tensor(self.stage)}, filename, ver, prefix)

    # What is new here.
    def _follow(self, trainer: Trainer) -> None:
        """Start a new competition when stages have run since the last one began."""
        stage = stages_run(trainer)
        if stage == self.stage:
            return
        if not self.keep_earlier:
            self._earlier += dict.fromkeys(path for path in (*self.best_k_models, self.best_model_path) if path)
        self.stage, self._is_new_score = stage, False
        self.best_k_models, self.kth_best_model_path = {}, ""
        self.best_model_path, self.best_model_score, self.current_score = "", None, None
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def _finish(self, trainer: Trainer) -> None:
        """A file of the final weights with a score of their own, if stages have run since the last file."""
        self._follow(trainer)
        if self.best_model_path or not self.stage or not self.save_top_k or compat.fast_dev_run(trainer):
            return
        score: Optional[Tensor] = None
        if self.monitor is not None:
            figures = final_figures(trainer)
            if self.monitor not in figures:
                with torch.inference_mode(False), torch.no_grad():
                    figures = compat.evaluate(trainer)
            if self.monitor in figures:
                score = torch.tensor(figures[self.monitor])
            else:
                rank_zero_warn(
                    f"{type(self).__name__}: stages ran at the end of training, and {self.monitor!r}, which validation "
                    "does not log, was not measured after them: the last checkpoint is kept without a score"
                )
        self._is_new_score = True
        compat.save_with_score(self, trainer, score)
        self._tidy(trainer)

    def _tidy(self, trainer: Trainer) -> None:
        """Remove the winners of earlier competitions; not before there is a file of the present one."""
        if self.best_model_path:
            for path in self._earlier:
                trainer.strategy.remove_checkpoint(path)
            self._earlier = []


def is_plain(callback: Any) -> bool:
    """True for checkpoints that compete over stages: those of before and of after one."""
    return (
        isinstance(callback, ModelCheckpoint)
        and not isinstance(callback, CompressedCheckpoint)
        and callback.monitor is not None
        and callback.save_top_k != 0
    )
