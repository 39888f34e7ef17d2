"""Averages of the weights (EMA, SWA) hold masks and grids like the live weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small import Small, is_two_four, loader, quiet_trainer, same, weights
from torch import nn

import lightning_obc as obc

SPEC = obc.Calibration(samples=16)
AVERAGING: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema-late": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=4, update_starting_at_epoch=1),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1),
}


def recipe(kind: str) -> list[Any]:
    if kind == "prune":
        return [obc.Prune("2:4", at={"step": 8})]
    if kind == "end":
        return [obc.Prune("2:4"), obc.Quantize(3)]
    return [obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(3, at={"epoch": 1}, after=kind)]


class Held(Callback):
    """Checks masks and grids of the model in every validation, where an average may stand in for it."""

    def __init__(self, callback: obc.OBCCallback) -> None:
        self.callback, self.seen = callback, 0

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.callback._state.timetable.done:
            self.seen += 1
            check_held(self.callback, pl_module.state_dict())


def check_held(callback: obc.OBCCallback, state: dict[str, torch.Tensor]) -> None:
    copy = Small()
    copy.load_state_dict(state)
    for name, layer in callback._state.held.layers.items():
        module: nn.Module = copy.get_submodule(name)
        assert is_two_four(module.weight), name
        if layer.grid is not None:
            shape = layer.mask.shape
            matrix = (module.weight.permute(0, 2, 3, 1) if name == "conv" else module.weight).detach().reshape(shape)
            assert torch.equal(layer.grid.quantize(matrix) * layer.mask + 0.0, matrix), name


@pytest.mark.parametrize("kind", ["prune", "freeze", "train", "end"])
@pytest.mark.parametrize("averaging", AVERAGING)
def test_averages_are_compressed_wherever_they_show(tmp_path: Path, averaging: str, kind: str) -> None:
    callback = obc.OBCCallback(recipe(kind), SPEC, save_checkpoint=tmp_path / "end.ckpt", verbose=False)
    held, average = Held(callback), AVERAGING[averaging]()
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    # Its place in the list does not matter: the averaging callback comes second here.
    trainer = quiet_trainer(tmp_path, callback, average, held, files, max_epochs=4, enable_checkpointing=True)
    model = Small(torch.optim.SGD, lr=0.2, momentum=0.9)
    trainer.fit(model, loader(), loader(1, shuffle=False))
    assert held.seen == 0 if kind == "end" else held.seen > 6
    check_held(callback, model.state_dict())
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert same(saved["state_dict"], weights(model)), "the file is the model that was compared"
    if kind != "end":
        state = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
        check_held(callback, state)
    assert same(weights(Small.load_from_checkpoint(tmp_path / "end.ckpt")), weights(model))


def test_the_average_follows_the_compressed_weights_and_not_the_dense_ones(tmp_path: Path) -> None:
    """With an equal mean, the average at the end is that of the weights since the stage."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step >= 12:
                seen.append(pl_module.fc.weight.detach().clone())

    callback = obc.OBCCallback([obc.Prune("2:4", at={"step": 12})], SPEC, save_checkpoint=False, verbose=False)
    model = Small()
    quiet_trainer(tmp_path, WeightAveraging(), callback, Look()).fit(model, loader())
    torch.testing.assert_close(model.fc.weight.detach(), torch.stack(seen).mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["freeze", "train"])
def test_resume_with_an_average_after_a_crash(tmp_path: Path, kind: str) -> None:
    class Crash(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("crash")

    def fit(path: Path, *more: Callback, resume: Any = None) -> Small:
        torch.manual_seed(1)
        model = Small(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
        model.drop = nn.Identity()
        callback = obc.OBCCallback(recipe(kind), SPEC, save_checkpoint=False, verbose=False)
        options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer = quiet_trainer(path, callback, EMAWeightAveraging(decay=0.8), *more, **options)
        trainer.fit(model, loader(shuffle=False), loader(1, shuffle=False), ckpt_path=resume)
        return model

    whole = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "crash", Crash())
    (path,) = (tmp_path / "crash").rglob("*.ckpt")
    assert same(weights(whole), weights(fit(tmp_path / "again", resume=str(path))))
