"""The callback hands the calibration mode and the memory limit on to the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_obc as obc
from lightning_obc.errors import StrategyError


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


class Host(Small):
    """Notes for every call of a layer whether its weight is where the optimizer knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[str] = []
        for layer in (0, 2, 4):
            home = self.net[layer].weight.data_ptr()
            self.net[layer].register_forward_pre_hook(
                lambda module, args, home=home: self.arrivals.append(
                    "device" if module.weight.data_ptr() != home else "host"
                )
            )

    def calibration_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(64, 8, generator=generator)), batch_size=16)

    train_dataloader = val_dataloader = calibration_dataloader

    def validation_step(self, batch: tuple[Tensor], index: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


@pytest.mark.parametrize("when", ["train_start", "validate"])
def test_a_module_on_the_host_is_compressed_block_by_block_elsewhere(when: str, tmp_path: Path) -> None:
    stages = [obc.Prune("2:4", at=when), obc.Quantize(4, at=when)]  # type: ignore[arg-type]
    models: list[Host] = []
    for device in (None, "cpu:0"):
        torch.manual_seed(0)
        model = Host()
        calibration = obc.Calibration(samples=64, mode="asymmetric", execution_device=device)
        callback = obc.OBCCallback(stages, calibration, on_failure="raise", save_checkpoint=False, verbose=False)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **quiet)
        trainer.fit(model) if when == "train_start" else trainer.validate(model, verbose=False)
        assert ("device" in model.arrivals) == (device is not None)
        assert model.arrivals[-1] == "host"
        models.append(model)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_autocast_would_not_reach_the_blocks_elsewhere(tmp_path: Path) -> None:
    stages, calibration = [obc.Quantize(4, at="validate")], obc.Calibration(execution_device="cpu:0")
    callback = obc.OBCCallback(stages, calibration, save_checkpoint=False, compare=False, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[callback], default_root_dir=tmp_path, precision="bf16-mixed", **quiet)
    with pytest.raises(StrategyError, match="Mixed precision holds for the Trainer's own device only"):
        trainer.validate(Host(), verbose=False)
