"""The report of a run, written beside its compressed checkpoint."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_obc.errors import OBCError
from lightning_obc.report import CompressionReport
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
    """The command line of this process, where it is ours, and the callback that does the same in a script."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    lines = [] if seed is None else [f"# lightning.seed_everything({seed})"]
    if Path(sys.argv[0]).name == "lightning-obc":
        lines.append(f"# {shlex.join(['lightning-obc', *sys.argv[1:]])}")
    body = "".join(f"        {stage},\n" for stage in stages)
    lines.append("from lightning_obc import OBCCallback\nfrom lightning_obc.specs import *\n")
    lines.append(f"OBCCallback(\n    stages=[\n{body}    ],\n    calibration={calibration},\n)")
    return "\n".join(lines)
