"""``lightning-obc``: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict``, and ``compress``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Optional, Union

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI

from lightning_obc.callbacks import OBCCallback
from lightning_obc.errors import OBCError, ScheduleError
from lightning_obc.specs import Calibration, Prune, Quantize, Stage


class OBCTrainer(Trainer):
    """A Trainer that can also compress a model without training it."""

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
        weights_only: Optional[bool] = None,
    ) -> OBCCallback:
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
            weights_only: Passed on to ``Trainer.validate``.

        Returns:
            The callback that did the work; its ``report`` holds the figures.

        Raises:
            ScheduleError: There are no stages, neither here nor in a callback.
        """
        present: list[OBCCallback] = [c for c in vars(self)["callbacks"] if isinstance(c, OBCCallback)]
        callback = _validating(present, stages, calibration, on_failure, output)
        saved = vars(self)["callbacks"]
        self.callbacks = [c for c in saved if c not in present] + [callback]
        try:
            self.validate(
                model, dataloaders, ckpt_path, verbose=False, datamodule=datamodule, weights_only=weights_only
            )
        finally:
            self.callbacks = saved
        return callback


def _validating(
    present: Sequence[OBCCallback],
    stages: Optional[Sequence[Stage]],
    calibration: Optional[Calibration],
    on_failure: Optional[Literal["keep", "raise"]],
    output: Union[bool, str],
) -> OBCCallback:
    """A callback that runs the given stages, or those of the Trainer's own callback, during validation."""
    if stages is None and len(present) == 1:
        stages = present[0].stages
        calibration, on_failure = calibration or present[0].calibration, on_failure or present[0].on_failure
    if not stages:
        raise ScheduleError(
            "There is nothing to compress with",
            got=f"no stages, {len(present)} OBCCallbacks",
            expected="stages, or one OBCCallback in trainer.callbacks",
            remedy="write compress.stages in the configuration",
        )
    stages = [_at_validate(stage) for stage in stages]
    return OBCCallback(stages, calibration or Calibration(), on_failure or "keep", save_checkpoint=output)


def _at_validate(stage: Any) -> Stage:
    changes: dict[str, Any] = {"at": "validate"}
    if isinstance(stage, Prune):
        changes["schedule"] = None
    return replace(stage, **changes)


class OBCCLI(LightningCLI):
    """LightningCLI with the subcommand ``compress``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, with the arguments that do not come from the command line."""
        return {**LightningCLI.subcommands(), "compress": {"model", "dataloaders", "datamodule"}}

    def instantiate_classes(self) -> None:
        """Make the configured objects; what a specification refuses is said without the parser's own layers."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            reasons = _reasons(error)
            if not reasons:
                raise
            raise SystemExit("error: " + "\n       ".join(reasons)) from None


def _reasons(error: ValueError) -> list[str]:
    """The messages of this package's errors inside one that the parser has re-worded, each once."""
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return list(dict.fromkeys(line for line in lines if ". Got: " in line))


def main(args: ArgsType = None) -> OBCCLI:
    """Run the command line ``lightning-obc``, and return its parts.

    The current directory is importable, so that a ``class_path`` can name a user's own file. Errors of this package
    end the program with their message and status 1; all others keep their traceback.
    """
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        return OBCCLI(trainer_class=OBCTrainer, save_config_kwargs={"overwrite": True}, args=args)
    except OBCError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def console() -> None:
    """Entry point of the console script: what it returned would become the exit status."""
    main()


if __name__ == "__main__":
    console()
