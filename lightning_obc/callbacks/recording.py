"""Where and when: the compressed checkpoint of a run, the report beside it, and the time of a measurement."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_obc.errors import OBCError
from lightning_obc.report import CompressionReport, code
from lightning_obc.specs import Calibration, Stage


def when(trainer: Trainer) -> str:
    """The time of a measurement, for the reader."""
    if trainer.state.fn != TrainerFn.FITTING:
        return "as loaded"
    return f"epoch {trainer.current_epoch}, step {trainer.global_step}"


def checkpoint_path(trainer: Trainer, wanted: bool | str | os.PathLike[str]) -> Path:
    """Where the compressed checkpoint goes: ``wanted``, or beside the other checkpoints or logs."""
    if not isinstance(wanted, bool):
        return Path(wanted)
    beside = getattr(trainer.checkpoint_callback, "dirpath", None)
    return free_path(Path(beside or trainer.log_dir or trainer.default_root_dir), "compressed")


def free_path(folder: Path, stem: str) -> Path:
    """A checkpoint's path in a folder. As ModelCheckpoint does: never that of a file that is there."""
    names = (f"{stem}.ckpt", *(f"{stem}-v{version}.ckpt" for version in range(1, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())


def write_report(report: CompressionReport, checkpoint: Path, calibration: Calibration) -> list[Path]:
    """Write ``NAME.report.html`` (with the extra ``report``), ``.md`` and ``.json`` beside ``NAME.ckpt``.

    A report that cannot be written loses no run: a warning says why.
    """
    try:
        return report.save(
            checkpoint.with_suffix(".report"),
            title=f"Compression of {type(report.model).__name__}",
            overwrite=True,
            reproduce=reproduce(report.recipe, calibration),
        )
    except OBCError as error:
        rank_zero_warn(f"The report was not written. {error}")
        return []


def reproduce(stages: Sequence[Stage], calibration: Calibration) -> str:
    """How this process was started, and the callback that does the same in a script."""
    body = "".join(f"        {code(stage)},\n" for stage in stages)
    call = f"obc.OBCCallback(\n    stages=[\n{body}    ],\n    calibration={code(calibration)},\n)"
    return "\n".join([*started_with(), "import lightning_obc as obc", "", call])


def started_with() -> list[str]:
    """The seed and the command line of this process, as far as they are known, as comments."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    lines = [] if seed is None else [f"# lightning.seed_everything({seed})"]
    if Path(sys.argv[0]).name == "lightning-obc":
        lines.append(f"# {shlex.join(['lightning-obc', *sys.argv[1:]])}")
    return lines
