"""The report of a run, written beside its compressed checkpoint."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_obc.errors import OBCError
from lightning_obc.report import CompressionReport, code
from lightning_obc.specs import Calibration, Stage


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
