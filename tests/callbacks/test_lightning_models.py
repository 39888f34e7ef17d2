"""Cases of Lightning's own test suite, written for this callback: pruning, hooks, callback state."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from small import quiet_trainer, same, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_obc as obc
from lightning_obc.errors import ScheduleError

SPEC = obc.Calibration(samples=16)


class Boring(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            OrderedDict(
                [
                    ("mlp_1", nn.Linear(32, 32)),
                    ("mlp_2", nn.Linear(32, 32, bias=False)),
                    ("mlp_3", nn.Linear(32, 2)),
                ]
            )
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("test", -float(batch_idx))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 24), batch_size=4)


def zeros(model: Any, name: str) -> float:
    return float((getattr(model.layer, name).weight == 0).float().mean())


def callback(*stages: Any, **options: Any) -> obc.OBCCallback:
    return obc.OBCCallback(list(stages), SPEC, verbose=False, **({"save_checkpoint": False} | options))


@pytest.mark.parametrize("pattern", ["2:4", 0.3, obc.Structured(0.25)])
@pytest.mark.parametrize("layers", [None, ["layer.mlp_1", "layer.mlp_2"]])
def test_pruning_callback(tmp_path: Path, pattern: Any, layers: Any) -> None:
    model = Boring()
    assert bool((model.layer.mlp_2.weight != 0).all())
    own = callback(obc.Prune(pattern, at={"epoch": 1}, layers=layers))
    trainer = quiet_trainer(tmp_path, own)
    trainer.fit(model)
    trainer.test(model, verbose=False)
    assert zeros(model, "mlp_2") == pytest.approx(obc.specs.parse_pattern(pattern).sparsity, abs=0.01)
    assert (zeros(model, "mlp_3") > 0) == (layers is None)
    assert not list(model.named_buffers())
    assert set(model.state_dict()) == set(Boring().state_dict())


def test_several_callbacks_on_different_layers(tmp_path: Path) -> None:
    model = Boring()
    first = callback(obc.Prune(0.5, at={"epoch": 0}, layers=["layer.mlp_1"]), obc.Prune(0.6, layers=["layer.mlp_1"]))
    second = callback(obc.Prune(0.25, at={"epoch": 1}, layers=["layer.mlp_3"]))
    trainer = quiet_trainer(tmp_path, first, second)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    assert (zeros(model, "mlp_1"), zeros(model, "mlp_3")) == pytest.approx((0.6, 0.25), abs=0.01)
    twins = [callback(*own.stages) for own in (first, second)]
    resumed = Boring()
    quiet_trainer(tmp_path, *twins, max_epochs=5).fit(resumed, ckpt_path=str(tmp_path / "both.ckpt"), weights_only=True)
    assert (zeros(resumed, "mlp_1"), zeros(resumed, "mlp_3")) == pytest.approx((0.6, 0.25), abs=0.01)
    assert not torch.equal(resumed.layer.mlp_1.weight, model.layer.mlp_1.weight)
    with pytest.raises(ScheduleError, match=r"layer\.mlp_1"):
        quiet_trainer(tmp_path, first, callback(obc.Quantize(4, layers=["layer.mlp_1"]))).fit(Boring())


@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize("stage_at", [{"epoch": 1}, {"step": 6}, {"step": 12}])
def test_a_model_that_is_saved_several_times_stays_as_it_is(tmp_path: Path, at_epoch_end: bool, stage_at: Any) -> None:
    """Pruned and saved in the same moment of the epoch included: Lightning's own callback is expected to fail there."""

    class Untouched(Callback):
        saved: list[dict[str, Tensor]]

        def __init__(self) -> None:
            self.saved = []

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            assert set(checkpoint["state_dict"]) == set(Boring().state_dict())
            self.saved.append(weights(pl_module))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if self.saved and stage_at != {"epoch": 1}:
                assert same(self.saved[-1], weights(pl_module)) or trainer.global_step % 6
            assert all(parameter.grad_fn is None for parameter in pl_module.parameters())

    own, look = callback(obc.Prune("2:4", at=stage_at, layers=["layer.mlp_3"])), Untouched()
    files = ModelCheckpoint(
        tmp_path, monitor="test", save_top_k=2, save_last=True, save_on_train_epoch_end=at_epoch_end
    )
    model = Boring()
    trainer = quiet_trainer(tmp_path, own, look, files, enable_checkpointing=True)
    trainer.fit(model)
    assert look.saved
    assert zeros(model, "mlp_3") == 0.5
    for path in (files.last_model_path, files.kth_best_model_path):
        state = torch.load(path, weights_only=True)
        loaded = Boring.load_from_checkpoint(path, weights_only=True)
        compressed = bool(state["callbacks"][own.state_key]["done"])
        assert zeros(loaded, "mlp_3") == (0.5 if compressed else 0.0)
        assert any(same(weights(loaded), saved) for saved in look.saved)
    assert zeros(Boring.load_from_checkpoint(files.last_model_path, weights_only=True), "mlp_3") == 0.5


class Mixed(Boring):
    """A part in evaluation mode, as users freeze batch-norm; ``train`` modes must come back as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.layer(x))

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()


def test_train_and_eval_modes_are_restored(tmp_path: Path) -> None:
    seen = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.training, pl_module.layer.training, pl_module.frozen.training))

    own = callback(obc.Prune("1:2", at={"epoch": 1}), obc.Quantize(4, at={"step": 8}))
    quiet_trainer(tmp_path, own, Modes(), max_epochs=2).fit(Mixed())
    assert seen[0] == (True, True, False)
    assert set(seen) == {(True, True, False)}


def test_callback_state_is_restored_by_key_and_survives_a_change_of_place(tmp_path: Path) -> None:
    """State goes by recipe: another order of the callbacks, and others beside them, change nothing."""
    stages = [obc.Prune("2:4", at="train_start"), obc.Quantize(4, at={"epoch": 1}, after="train")]
    own = callback(*stages, save_checkpoint=tmp_path / "own.ckpt")
    quiet_trainer(tmp_path, own).fit(Boring())
    twin = callback(*stages)
    trainer = quiet_trainer(tmp_path, Callback(), twin, max_epochs=3)
    trainer.fit(Boring(), ckpt_path=str(tmp_path / "own.ckpt"), weights_only=True)
    assert twin._state.timetable.done == own._state.timetable.done == [0, 1]
    mine, theirs = own.state_dict()["layers"], twin.state_dict()["layers"]
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert torch.equal(layer["mask"], theirs[name]["mask"])
        assert torch.equal(layer["latent"], theirs[name]["latent"])
        assert torch.equal(layer["grid"]["scale"], theirs[name]["grid"]["scale"])
    assert [row["stage"] for row in twin.state_dict()["reports"]] == [str(stage) for stage in stages]
