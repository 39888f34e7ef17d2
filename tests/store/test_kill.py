"""A compress run that is killed at random points, and a fit that is: they end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from children import SERVER
from torch import Tensor, nn

LAYERS = 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(LAYERS)])


def compress(folder: str) -> None:
    """One run from the dense model, with its result in ``folder``."""
    import lightning_obc as obc

    torch.set_num_threads(1)
    batches = [torch.randn(128, 32, generator=torch.Generator().manual_seed(1))]
    # Slow enough to be killed anywhere: the reference backend, one weight at a time.
    stages = [obc.Prune("2:4", backend="naive"), obc.Quantize(4, backend="naive")]
    report = obc.compress(
        network(), batches, stages, calibration=obc.Calibration(mode="sequential"), store=Path(folder) / "store"
    )
    losses = torch.tensor([row.loss for stage in report.stages for row in stage.layers], dtype=torch.float64)
    finish(folder, {**report.model.state_dict(), "losses": losses})


def finish(folder: str, result: dict[str, Tensor]) -> None:
    torch.save(result, f"{folder}/part")
    os.replace(f"{folder}/part", f"{folder}/result.pt")


def fit(folder: str) -> None:
    """A training run that prunes in three steps, then quantizes, from its last checkpoint on if there is one.

    It checkpoints every fifth step, never after the last batch of an epoch: Lightning 2.6 miscounts the epochs of a run
    that is resumed several times from such checkpoints. There is no dropout: Lightning does not save random states.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    import lightning_obc as obc
    from tests.callbacks.small import Small, quiet_trainer, resumable

    torch.set_num_threads(1)
    torch.manual_seed(0)
    gradual = obc.Gradual(3, every=4, initial=0.2)
    stages = [obc.Prune(0.5, at={"step": 3}, schedule=gradual, backend="naive"), obc.Quantize(4, backend="naive")]
    callback = obc.OBCCallback(stages, store=f"{folder}/store", save_checkpoint=False, verbose=False, compare=False)
    checkpoint = ModelCheckpoint(f"{folder}/checkpoints", save_last=True, every_n_train_steps=5)
    trainer = quiet_trainer(folder, callback, checkpoint, enable_checkpointing=True)
    last = Path(folder) / "checkpoints" / "last.ckpt"
    model = Small()
    model.drop = nn.Identity()
    trainer.fit(model, resumable(), ckpt_path=str(last) if last.exists() else None)
    finish(folder, model.state_dict())


def solved(folder: Path) -> dict[str, int]:
    """Solved layers and when their files were written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "store").glob("stage*.safetensors")}


def undisturbed(job: Any, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    process = SERVER.Process(target=job, args=(str(folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return torch.load(folder / "result.pt", weights_only=True)


def killed(job: Any, folder: Path, more: int, delay: float) -> bool:
    """Start a run, kill it a while after ``more`` further layers are solved. False: it ended before."""
    goal = len(solved(folder)) + more
    process = SERVER.Process(target=job, args=(str(folder),))
    process.start()
    while process.is_alive() and len(solved(folder)) < goal:
        time.sleep(0.0005)
    time.sleep(delay)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_kills(job: Any, tmp_path: Path, kills: int, total: int) -> None:
    """Kill runs ``kills`` times; a run that ends before its kill is checked, and the next one starts from nothing."""
    expected = undisturbed(job, tmp_path / "calm")
    assert len(solved(tmp_path / "calm")) == total
    luck, hits, folder = random.Random(0), 0, tmp_path / "run0"
    folder.mkdir()
    for attempt in range(1, 4 * kills):
        before = solved(folder)
        hit = killed(job, folder, luck.choice((0, 1, 1)), luck.choice((0.0, 0.003, 0.01, 0.05)))
        assert before.items() <= solved(folder).items(), "a layer was solved twice"
        hits += hit
        if hits == kills:
            break
        if not hit:
            check_result(folder, expected, total)
            folder = tmp_path / f"run{attempt}"
            folder.mkdir()
    assert hits == kills
    before = solved(folder)
    process = SERVER.Process(target=job, args=(str(folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert before.items() <= solved(folder).items()
    check_result(folder, expected, total)


def check_result(folder: Path, expected: dict[str, Tensor], total: int) -> None:
    assert len(solved(folder)) == total
    result = torch.load(folder / "result.pt", weights_only=True)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and a fork server")


@needs_fork
def test_three_kills_of_a_compress_run(tmp_path: Path) -> None:
    check_kills(compress, tmp_path, kills=3, total=2 * LAYERS)


@needs_fork
@pytest.mark.slow
def test_ten_kills_of_a_compress_run(tmp_path: Path) -> None:
    check_kills(compress, tmp_path, kills=10, total=2 * LAYERS)


@needs_fork
@pytest.mark.slow
def test_ten_kills_of_a_fit_that_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    check_kills(fit, tmp_path, kills=10, total=8)
