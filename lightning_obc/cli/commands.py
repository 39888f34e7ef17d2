"""LightningCLI with this package's subcommands, and with errors that say what is wrong."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_obc.cli.checkpoints import check_checkpoint
from lightning_obc.cli.parsing import OBCParser, RunConfig
from lightning_obc.cli.trainer import OBCTrainer
from lightning_obc.errors import ScheduleError

_DATA = {"model", "dataloaders", "datamodule"}
_OF_TRAINED = ("compress", "search", "apply", "export")


class OBCCLI(LightningCLI):
    """LightningCLI with the subcommands ``compress``, ``search``, ``apply`` and ``export``.

    Attributes:
        result: What the subcommand returned.
    """

    result: Any = None

    @classmethod
    def start(cls, args: ArgsType = None) -> OBCCLI:
        """Parse the command line, run the subcommand, and return the parts."""
        return cls(
            trainer_class=OBCTrainer,
            parser_class=OBCParser,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "description": "Optimal Brain Compression for PyTorch Lightning: train, compress, search, export.",
                "epilog": "Two more subcommands need files alone: 'lightning-obc report' draws the report of a run or "
                "compares several, 'lightning-obc benchmark' times exported models. Each has a --help of its own.",
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, with the arguments that do not come from the command line."""
        own = dict.fromkeys(("compress", "search", "apply", "export"), _DATA)
        return {**LightningCLI.subcommands(), **own}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; look at the checkpoint before Lightning reads it, and before models and data are made.

        Raises:
            SpecError: There is no file or folder ``ckpt_path``, or the file is damaged.
        """
        super().parse_arguments(parser, args)
        check_checkpoint(str(self.config.get(str(self.config.get("subcommand")), {}).get("ckpt_path") or ""))
        # Lightning puts the model that a checkpoint names in the place of this one.
        self._asked = self._model_class_path()

    def _model_class_path(self) -> str:
        model = self.config.get(str(self.config.get("subcommand")), {}).get("model")
        return str(model.get("class_path") or "") if model is not None else ""

    def _note(self) -> None:
        """Say what would go unnoticed: weights that nobody trained, another model than the configuration's."""
        given = self.config.get(str(self.subcommand), {})
        if self.subcommand in _OF_TRAINED and not given.get("ckpt_path") and not given.get("train"):
            rank_zero_info("note: no --ckpt_path: the weights are those that the model has when it is made")
        used = self._model_class_path()
        if self._asked and used != self._asked:
            rank_zero_info(
                f"note: the checkpoint says that its model is {used}; Lightning takes that, not {self._asked} of the "
                "configuration"
            )

    def before_instantiate_classes(self) -> None:
        self._note()

    def instantiate_classes(self) -> None:
        """Make the configured objects; what a specification refuses is said without the parser's own layers."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            reasons = _reasons(error)
            if not reasons:
                raise
            raise SystemExit("error: " + "\n       ".join(reasons)) from None

    def after_fit(self) -> None:
        """A training that has ended before all stages ran has not done what was asked for: its status is not 0.

        Raises:
            ScheduleError: So it is; the stages are named.
        """
        callbacks = [callback for callback in self._trainer.own_callbacks if callback.stages_left]
        if self.config.fit.plan or not callbacks:
            return
        left = [stage for callback in callbacks for stage in callback.stages_left]
        raise ScheduleError(
            f"The training has ended, but {len(left)} of the compression stages did not run",
            got="; ".join(f"{stage} at {stage.at}" for stage in left),
            expected="a training in which every stage has its time",
            remedy='use at="train_end", train longer and resume with --ckpt_path, or run lightning-obc compress on the '
            "checkpoint",
        )

    @property
    def _trainer(self) -> OBCTrainer:
        assert isinstance(self.trainer, OBCTrainer)
        return self.trainer

    def compress(self, **kwargs: Any) -> None:
        self.result = self._trainer.compress(**kwargs)

    def search(self, **kwargs: Any) -> None:
        self.result = self._trainer.search(**kwargs)

    def apply(self, **kwargs: Any) -> None:
        self.result = self._trainer.apply(**kwargs)

    def export(self, **kwargs: Any) -> None:
        self.result = self._trainer.export(**kwargs)


def _reasons(error: ValueError) -> list[str]:
    """The messages of this package's errors inside one that the parser has re-worded, each once."""
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return list(dict.fromkeys(line for line in lines if ". Got: " in line))
