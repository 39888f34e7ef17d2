"""The parser of the command line, and where the configuration of a run is kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lightning_obc.cli.mistakes import arguments_of, explain


class OBCParser(LightningArgumentParser):
    """A parser whose errors say what is wrong, where, and what may have been meant."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """``--plan`` alone means ``--plan=true``; everything else is the parser's."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_args([*map(_with_value, words, [*words[1:], ""])], *rest, **options)

    def parse_object(self, given: Any, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Lightning hands the hyperparameters of a checkpoint to the parser, on top of the configuration."""
        # The names of these arguments differ between versions of the parser; Lightning gives them by position.
        return super().parse_object(_with_class(given, rest[0]) if rest and rest[0] else given, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        lines = explain(message)
        if 'Invalid option "comments"' in message:
            lines = [
                "--print_config=comments needs the package 'ruamel.yaml'. Remedy: pip install 'lightning-obc[comments]'"
            ]
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        text = "\n       ".join(lines)
        sys.stderr.write(f"error: {text}\nall options: {program} --help, or with their values: --print_config\n")
        self.exit(2)


def _with_class(given: Any, base: Any) -> Any:
    """Hyperparameters in a checkpoint that a script has saved name no class: they are arguments of the configured one.

    What ``save_hyperparameters`` has saved beside the arguments of the class is left out.
    """
    for subcommand, content in given.items() if isinstance(given, Mapping) else ():
        values = content.get("model") if isinstance(content, Mapping) else None
        model = base.get(subcommand, {}).get("model")
        path = None if model is None else model.get("class_path")
        if isinstance(values, Mapping) and "class_path" not in values and path:
            known = arguments_of(path)
            init = {name: value for name, value in values.items() if name in known}
            return {**given, subcommand: {**content, "model": {"class_path": path, "init_args": init}}}
    return given


def _with_value(word: str, following: str) -> str:
    return "--plan=true" if word == "--plan" and following not in ("true", "false") else word


class RunConfig(SaveConfigCallback):
    """Keeps the configuration beside the logs of its run.

    Without a logger a run has no folder of its own; a ``config.yaml`` in the current directory, which may well be the
    user's, is not written over then.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)
