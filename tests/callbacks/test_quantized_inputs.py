"""Quantized layer inputs through training, checkpoints and their resumption."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from small import Small, loader, quiet_trainer, same, weights

import lightning_obc as obc
from lightning_obc.activations import ActivationQuantizer, attached
from lightning_obc.callbacks import OBCCallback
from lightning_obc.errors import CalibrationError

SPEC = obc.Calibration(samples=16)


def make(**options) -> OBCCallback:
    stage = obc.Quantize(4, at={"epoch": 1}, after="train", activations=5)
    return OBCCallback([stage], SPEC, **({"verbose": False, "save_checkpoint": False} | options))


class Codes(Callback):
    """Counts the distinct inputs of the last layer in the training steps of each epoch."""

    def __init__(self) -> None:
        self.most: dict[int, int] = {}

    def on_train_epoch_start(self, trainer, pl_module):
        def count(module, args):
            if pl_module.training:
                self.most[trainer.current_epoch] = max(
                    self.most.get(trainer.current_epoch, 0), args[0].unique().numel()
                )

        # Registered anew, to come behind what the stage of this epoch has attached.
        self.handle = pl_module.fc.register_forward_pre_hook(count)

    def on_train_epoch_end(self, trainer, pl_module):
        self.handle.remove()


def test_a_resumed_run_has_the_ranges_and_the_weights_of_an_uninterrupted_one(tmp_path):
    ckpt, watch = tmp_path / "epoch1.ckpt", Codes()

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"epoch{trainer.current_epoch}.ckpt")

    torch.manual_seed(0)
    module, data = Small(), loader(shuffle=False)
    module.drop.p = 0.0  # a resumed run draws other random numbers
    callback = make()
    trainer = quiet_trainer(tmp_path, callback, watch, Save())
    trainer.fit(module, data, loader(1, shuffle=False))
    assert watch.most[0] > 2**5 >= max(watch.most[1], watch.most[2])
    assert {row.input_bits for row in callback.report.stages[0].layers} == {5}
    assert list(module.state_dict()) == list(Small().state_dict())

    resumed = Small()
    resumed.drop.p = 0.0
    quiet_trainer(tmp_path, make()).fit(resumed, data, loader(1, shuffle=False), ckpt_path=ckpt)
    ours, theirs = attached(module), attached(resumed)
    assert set(ours) == set(theirs) == {"conv", "fc"}
    for name in ours:
        assert torch.equal(ours[name].grid.scale, theirs[name].grid.scale)
    assert same(weights(module), weights(resumed))

    # Loaded for validation, with this callback or with another recipe, it gives the figures it gave when it was saved.
    state = torch.load(ckpt, weights_only=True)
    fresh = Small()
    fresh.load_state_dict(state["state_dict"])
    for other in (make(), OBCCallback([obc.Prune(0.5, at="train_end")], SPEC, verbose=False)):
        loaded = Small()
        quiet_trainer(tmp_path, other).validate(loaded, loader(1, shuffle=False), ckpt_path=ckpt, verbose=False)
        assert set(attached(loaded)) == {"conv", "fc"}
        assert not torch.equal(loaded.eval()(torch.ones(1, 4, 6, 6)), fresh.eval()(torch.ones(1, 4, 6, 6)))

    # Dense weights have dense inputs, whether their file knows of the recipe or not.
    for known in (True, False):
        dense = torch.load(tmp_path / "epoch0.ckpt", weights_only=True)
        torch.save(dense if known else dense | {"callbacks": {}}, tmp_path / "dense.ckpt")
        trainer.validate(module, loader(1, shuffle=False), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
        assert attached(module) == {}
        trainer.validate(module, loader(1, shuffle=False), ckpt_path=tmp_path / "epoch1.ckpt", verbose=False)
        assert set(attached(module)) == {"conv", "fc"}


def test_ranges_that_cannot_be_found_leave_no_half_of_a_stage(tmp_path, monkeypatch):
    """Weights are written before ranges are found: a failure there takes them back."""
    module, data = Small(), loader(shuffle=False)
    before = weights(module)

    def fail(self):
        raise CalibrationError("no range")

    monkeypatch.setattr(ActivationQuantizer, "freeze", fail)
    stage = obc.Quantize(8, at="train_start", overrides={"fc": {"activations": 8}})
    callback = OBCCallback([stage], SPEC, verbose=False, save_checkpoint=False)
    with pytest.raises(CalibrationError, match="no range"):
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(module, data)
    assert same(weights(module), before)
    assert attached(module) == {}
