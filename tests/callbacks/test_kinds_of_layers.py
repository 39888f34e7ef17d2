"""The callback with layers that own several weights, with weights that are computed, and with corrections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from small import Small, loader, quiet_trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_obc as obc
from lightning_obc.errors import ScheduleError, UnsupportedLayerError


class Attentive(LightningModule):
    """One attention layer over the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return self.fc(self.attention(tokens, tokens, tokens)[0].mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def is_two_of_four(weight: Tensor) -> bool:
    return bool(((weight.detach().reshape(-1, 4) != 0).sum(1) <= 2).all())


def test_attention_keeps_its_pattern_through_training_and_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, callback = Attentive(), obc.OBCCallback([obc.Prune("2:4", at="train_start")], save_checkpoint=tmp_path / "a")
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(model, loader(), loader())
    assert set(callback.report.layers) == {"attention.in_proj", "attention.out_proj", "fc"}
    assert is_two_of_four(model.attention.in_proj_weight)
    assert is_two_of_four(model.fc.weight)
    again, resumed = Attentive(), obc.OBCCallback([obc.Prune("2:4", at="train_start")], save_checkpoint=False)
    quiet_trainer(tmp_path, resumed, max_epochs=4).fit(
        again, loader(), loader(), ckpt_path=str(tmp_path / "a"), weights_only=True
    )
    assert not torch.equal(again.attention.in_proj_weight, model.attention.in_proj_weight)
    assert torch.equal(again.attention.in_proj_weight == 0, model.attention.in_proj_weight == 0)


def computed() -> Small:
    model = Small()
    model.fc = parametrizations.weight_norm(model.fc)
    return model


def test_computed_weights_are_refused_before_training(tmp_path: Path) -> None:
    model = computed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = obc.OBCCallback([obc.Quantize(4)], save_checkpoint=False)
    with pytest.raises(UnsupportedLayerError, match="fc"):
        quiet_trainer(tmp_path, callback, max_epochs=2).fit(model, loader(), loader())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_computed_weights_are_compressed_without_training(tmp_path: Path) -> None:
    model = computed()
    callback = obc.OBCCallback([obc.Prune("2:4", at="validate")], save_checkpoint=False)
    model.train_dataloader = loader  # type: ignore[method-assign]
    quiet_trainer(tmp_path, callback).validate(model, loader(), verbose=False)
    assert is_two_of_four(model.fc.weight)


def test_batch_norm_reset_at_the_end(tmp_path: Path) -> None:
    model = Small()
    stages = [obc.Prune("1:4", at="train_end"), obc.Correct("batch_norm", at="train_end")]
    callback = obc.OBCCallback(stages, save_checkpoint=False)
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(model, loader(), loader())
    outputs = torch.cat([model.conv(images) for images, _ in loader(shuffle=False)])
    torch.testing.assert_close(model.norm.running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert [report.method for report in callback.report.corrections] == ["batch_norm"]
    assert "batch_norm" in callback.report.table()


@pytest.mark.parametrize("method", ["statistics", "bias", "vectors", "global"])
def test_corrections_towards_the_model_before_the_stage(tmp_path: Path, method: str) -> None:
    model = Small()
    correct = obc.Correct(method, at="train_end", **({"epochs": 2} if method in ("vectors", "global") else {}))
    callback = obc.OBCCallback([obc.Prune("1:4", at="train_end"), correct], save_checkpoint=False, on_failure="raise")
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(model, loader(), loader())
    (report,) = callback.report.corrections
    assert report.layers
    weight = model.conv.weight.detach().movedim(1, -1).reshape(-1, 4)
    assert bool(((weight != 0).sum(1) <= 1).all())
    if method in ("statistics", "bias"):
        assert all(row.after is not None and row.after <= row.before + 1e-6 for row in report.layers)


def test_a_reference_that_training_would_leave_behind_is_refused() -> None:
    with pytest.raises(ScheduleError, match="at that time"):
        obc.OBCCallback([obc.Prune("2:4", at={"epoch": 1}), obc.Correct("statistics", at="train_end")])
    obc.OBCCallback([obc.Prune("2:4", at={"epoch": 1}), obc.Correct("batch_norm", at="train_end")])


def test_a_gradual_schedule_reaches_its_sparsity_step_by_step(tmp_path: Path) -> None:
    model = Small()
    gradual = obc.Prune(0.8, at={"epoch": 0}, layers=["conv"], schedule=obc.Gradual(3, every=1, initial=0.2))
    callback = obc.OBCCallback([gradual], obc.Calibration(samples=48), save_checkpoint=False, verbose=False)
    quiet_trainer(tmp_path, callback, max_epochs=3).fit(model, loader(), loader())
    levels = [stage.layers[0].sparsity for stage in callback.report.stages]
    assert levels[0] == pytest.approx(0.2, abs=0.01)
    assert levels == sorted(set(levels))
    assert levels[-1] == pytest.approx(0.8, abs=0.01)
    assert float((model.conv.weight == 0).float().mean()) == pytest.approx(levels[-1])
