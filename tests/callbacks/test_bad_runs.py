"""Trainers that are limited, empty or misconfigured, and models that share or freeze their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from small import Small, is_two_four, loader, quiet_trainer, same, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_obc as obc
from lightning_obc.errors import EmptyCalibrationError, ExportError, FingerprintError, ScheduleError

SPEC = obc.Calibration(samples=16)
RECIPE = [obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(4)]


def make(*stages: Any, **options: Any) -> obc.OBCCallback:
    options = {"verbose": False, "save_checkpoint": False} | options
    return obc.OBCCallback(list(stages) or RECIPE, SPEC, **options)


def test_stages_that_overlap_are_refused_or_go_into_callbacks_of_their_own(tmp_path: Path) -> None:
    gradual = obc.Prune(0.5, at={"epoch": 0}, layers=["conv"], schedule=obc.Gradual(3))
    other = obc.Quantize(4, at={"epoch": 1}, layers=["fc"])
    with pytest.raises(ScheduleError, match="OBCCallback of their own"):
        make(gradual, other)
    callbacks = make(gradual), make(other)
    quiet_trainer(tmp_path, *callbacks).fit(Small(), loader(), loader(1, shuffle=False))
    assert [len(callback.report.stages) for callback in callbacks] == [3, 1]
    with pytest.raises(ScheduleError, match="never run"):
        quiet_trainer(tmp_path, make(gradual), max_epochs=2).fit(Small(), loader())


def test_places_that_cannot_be_written_are_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = weights(model := Small())
    for options in (
        {"save_checkpoint": tmp_path / "file" / "small.ckpt"},
        {"save_checkpoint": tmp_path},
        {"store": tmp_path / "file" / "store"},
    ):
        with pytest.raises(ExportError, match="Remedy"):
            quiet_trainer(tmp_path, make(**options)).fit(model, loader())
    assert same(before, weights(model))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    class Other(Small):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(8, 4))  # type: ignore[assignment]
            self.strict_loading = False

    callback = make(save_checkpoint=tmp_path / "small.ckpt")
    quiet_trainer(tmp_path, callback).fit(Small(), loader())
    with pytest.raises(FingerprintError, match="another model"):
        quiet_trainer(tmp_path, make(), max_epochs=4).fit(Other(), loader(), ckpt_path=str(tmp_path / "small.ckpt"))


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"limit_val_batches": 0},
        {"limit_val_batches": 1, "num_sanity_val_steps": 0},
        {"max_epochs": -1, "max_steps": 10},
    ],
)
def test_limited_trainers_run_every_stage(tmp_path: Path, options: dict[str, Any]) -> None:
    callback, model = make(), Small()
    quiet_trainer(tmp_path, callback, **options).fit(model, loader(), loader(1, shuffle=False))
    assert [stage.samples for stage in callback.report.stages] == [16, 16], "samples alone says how many there are"
    assert is_two_four(model.conv.weight)
    assert bool(callback.report.figures) == (options.get("limit_val_batches") != 0)


def test_empty_loaders(tmp_path: Path) -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 4, 6, 6), torch.zeros(0, dtype=torch.long)), batch_size=4)
    before = weights(model := Small())
    with pytest.raises(EmptyCalibrationError):
        quiet_trainer(tmp_path, make()).fit(model, empty)
    model.calibration_dataloader = lambda: empty  # type: ignore[assignment]
    with pytest.raises(EmptyCalibrationError):
        quiet_trainer(tmp_path, make(obc.Prune("2:4", at="train_start"))).fit(model, loader())
    assert same(before, weights(model))
    model, callback = Small(), make()
    quiet_trainer(tmp_path, callback).fit(model, loader(), empty)
    assert callback.report.figures == {}
    assert is_two_four(model.conv.weight)


class Shared(LightningModule):
    """One module used twice, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.again = self.inner
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(x.mean(3).flatten(1)[:, :8]))
        return self.head(torch.relu(self.tied(torch.relu(self.again(x)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


@pytest.mark.parametrize("after", ["freeze", "train"])
def test_shared_and_tied_weights_are_one_layer(tmp_path: Path, after: Any) -> None:
    stages = [obc.Prune("2:4", at={"step": 4}), obc.Quantize(3, at={"epoch": 1}, after=after)]
    model, callback = Shared(), make(*stages, save_checkpoint=tmp_path / "shared.ckpt")
    keys = list(model.state_dict())
    quiet_trainer(tmp_path, callback).fit(model, loader())
    assert set(callback.report.layers) == {"inner", "head"}
    assert model.tied.weight is model.inner.weight is model.again.weight
    assert is_two_four(model.tied.weight)
    assert max(len(row.unique()) for row in model.tied.weight) <= 8
    assert list(torch.load(tmp_path / "shared.ckpt", weights_only=True)["state_dict"]) == keys
    resumed = Shared()
    quiet_trainer(tmp_path, make(*stages), max_epochs=4).fit(
        resumed, loader(), ckpt_path=str(tmp_path / "shared.ckpt"), weights_only=True
    )
    assert resumed.tied.weight is resumed.inner.weight
    mask = callback._state.held.layers["inner"].mask[0]
    assert not resumed.tied.weight[~mask].any()
    assert is_two_four(resumed.tied.weight)


def test_frozen_parameters_are_compressed_unless_excluded(tmp_path: Path) -> None:
    for exclude, pruned in ((None, True), (["conv"], False)):
        model = Small(torch.optim.AdamW, lr=0.02)
        model.conv.requires_grad_(False)
        before = model.conv.weight.clone()
        stages = [obc.Prune("2:4", at={"epoch": 1}, exclude=exclude), obc.Quantize(4, exclude=exclude)]
        quiet_trainer(tmp_path, make(*stages)).fit(model, loader())
        assert is_two_four(model.conv.weight) == pruned
        assert torch.equal(before, model.conv.weight) != pruned
        assert not model.conv.weight.requires_grad
        assert is_two_four(model.fc.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-mixed"])
def test_zeros_and_grids_hold_in_half_precision_on_a_gpu(tmp_path: Path, precision: Any) -> None:
    model = Small(torch.optim.SGD, lr=0.05, momentum=0.9)
    stages = [obc.Prune("2:4", at={"step": 4}), obc.Quantize(4, at={"epoch": 1}, after="train")]
    options: dict[str, Any] = {"accelerator": "gpu", "precision": precision}
    quiet_trainer(tmp_path, make(*stages), **options).fit(model, loader(), loader(1, shuffle=False))
    for layer in (model.conv, model.fc):
        assert is_two_four(layer.weight)
        assert max(len(row.unique()) for row in layer.weight.flatten(1)) <= 16
