"""The law that times are fitted to, against made-up machines that follow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightning_obc as obc
from lightning_obc import timing
from lightning_obc.solvers import Refine

STAGES: dict[str, Any] = {
    "sweep": obc.Prune(0.5),
    "n:m": obc.Prune("3:7"),
    "column order": obc.Quantize(4, solver="gptq"),
    "groups": obc.Quantize(obc.IntGrid(4, granularity="group", group_size=48)),
    "oracle": obc.Prune(0.5, backend="naive"),
    "damping": obc.Quantize(4, damping="auto"),
    "masks": obc.Prune(0.5, refine=True),
    "codes": obc.Quantize(4, refine=Refine(judge=False)),
    "limited": obc.Quantize(4, refine=Refine(seconds=0.25)),
}


def machine(stage: Any, rows: int, columns: int) -> float:
    """Seconds of one solve without the choice of damping; with refinement where the stage refines."""
    power = 3 if stage.solver == "obs" else 2
    solve = 0.01 + 1e-4 * columns + 2e-10 * columns**3 + rows * 3e-10 * columns**power
    if not stage.refine:
        return solve
    judged = stage.refine is True or stage.refine.judge
    searching = 0.02 + 3e-4 * columns + rows * 5e-9 * columns ** (3 if isinstance(stage, obc.Prune) else 2)
    return (3 if judged else 1) * solve + searching


@pytest.mark.parametrize("name", STAGES)
def test_the_law_is_found_from_small_problems(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = STAGES[name]

    def timed(stage: Any, rows: int, columns: int, device: Any, lookup: bool = False) -> float:
        return 0.01 + 1e-7 * rows * columns if lookup else machine(stage, rows, columns)

    monkeypatch.setattr(timing, "_timed", timed)
    found = timing.measured_time(stage, lookups=True)
    expected = machine(stage, 512, 600)
    if name == "damping":
        expected = machine(obc.Quantize(4), 512, 600) + 10 * machine(obc.Quantize(4), 32, 600)
    if name == "limited":
        expected = 3 * machine(obc.Quantize(4), 512, 600) + 3 * 0.25
    # The least problem is taken for its fixed part alone, which leaves a part of its columns in it.
    assert found.seconds(1, 512, 600) == pytest.approx(expected, rel=0.1)
    assert found.lookup_seconds(10_000, 600) == pytest.approx(0.61, rel=0.05)


def test_a_real_stage_on_this_machine() -> None:
    found = timing.measured_time(obc.Quantize(4, backend="torch"), torch.device("cpu"), lookups=True)
    assert 0 < found.seconds(1, 16, 64) < found.seconds(1, 4096, 4096)
    assert found.lookup > 0
    assert found.flops_per_second is not None
    assert timing.measured_time(obc.Quantize(4, solver="rtn")).flops_per_second is None
