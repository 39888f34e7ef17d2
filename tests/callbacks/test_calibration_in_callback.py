"""The callback hands the calibration mode and the memory limit on to the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_obc as obc


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor], index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_asymmetric_calibration_under_a_memory_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    loader = DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=16)
    calibration = obc.Calibration(samples=64, mode="asymmetric", memory="16 KiB")
    callback = obc.OBCCallback([obc.Quantize(3)], calibration, on_failure="raise", save_checkpoint=False, compare=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **quiet).fit(model, loader)
    assert callback.report is not None
    assert [row.inherited is not None for row in callback.report.stages[0].layers] == [True] * 3
    assert "in 3 groups (layer)" in capsys.readouterr().out
    obc.compress(plain, loader, obc.Quantize(3), calibration=calibration)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
