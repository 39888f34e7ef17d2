"""The callback inside real Trainers: when stages run, what they leave, and what training may not undo."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from small import Small, is_two_four, levels, loader, quiet_trainer, same, weights

import lightning_obc as obc
from lightning_obc.callbacks import OBCCallback, compat
from lightning_obc.errors import (
    CalibrationError,
    FingerprintError,
    LayerNotFoundError,
    NonFiniteError,
    PatternError,
    ScheduleError,
    StrategyError,
)

SPEC = obc.Calibration(samples=16)


def make(*stages, **options) -> OBCCallback:
    return OBCCallback(list(stages), SPEC, **({"verbose": False, "save_checkpoint": False} | options))


def fit(module, callback, tmp_path, *more, data=None, **options) -> Trainer:
    trainer = quiet_trainer(tmp_path, callback, *more, **options)
    trainer.fit(module, data or loader(), loader(1, shuffle=False))
    return trainer


def test_stages_run_at_their_times(tmp_path):
    times = []

    class Clock(OBCCallback):
        def _compress(self, module, index, collect, display):
            times.append(
                (self._state.timetable.stages[index].at, module.trainer.current_epoch, module.trainer.global_step)
            )
            return super()._compress(module, index, collect, display)

    ats = ["train_start", {"epoch": 1}, {"step": 9}, {"epoch": 2}, "train_end"]
    levels_of = [0.1, 0.2, 0.3, 0.4, 0.5]
    stages = [obc.Prune(s, at=at, layers=["conv"]) for s, at in zip(levels_of, ats, strict=True)]
    callback = Clock(stages, SPEC, verbose=False, save_checkpoint=False)
    fit(Small(), callback, tmp_path)
    assert times == list(zip(ats, [0, 1, 1, 2, 3], [0, 6, 9, 12, 18], strict=True))
    assert [round(r.layers[0].sparsity, 2) for r in callback.report.stages] == pytest.approx(levels_of, abs=0.02)


def test_quantized_weights_are_frozen_and_the_rest_trains(tmp_path):
    module = Small(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch >= 1:
                seen.append((pl_module.conv.weight.detach().clone(), pl_module.fc.weight.detach().clone()))

    fit(module, make(obc.Quantize(3, at={"epoch": 1}, layers=["conv"])), tmp_path, Look())
    assert all(torch.equal(conv, seen[0][0]) for conv, _ in seen)
    assert not torch.equal(seen[0][1], seen[-1][1])
    assert levels(seen[0][0]) <= 8


def test_straight_through_training_stays_on_the_grid_and_keeps_zeros(tmp_path):
    module = Small(torch.optim.SGD, lr=1.0, momentum=0.9)
    stages = [obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(3, at={"epoch": 1}, after="train")]
    callback = make(*stages)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch >= 1:
                seen.append(pl_module.conv.weight.detach().clone())
                grid = callback._state.held.layers["conv"].grid
                rows = pl_module.conv.weight.permute(0, 2, 3, 1).reshape(1, 8, 36)
                assert torch.equal(grid.quantize(rows), rows)
                assert is_two_four(pl_module.conv.weight)

    fit(module, callback, tmp_path, Look())
    assert not torch.equal(seen[0], seen[-1])


INERT = [
    obc.Prune(0.5, at="validate"),
    obc.Prune(0.5, at="train_end"),
    obc.Prune(0.5, at=obc.Plateau("val_loss", patience=9)),
    obc.Quantize(4, at="train_end", edges=8, after="train"),
    obc.Prune(0.5, at={"step": 99}, schedule=obc.Gradual(3)),
]


@pytest.mark.parametrize("stages", [[stage] for stage in INERT])
def test_training_with_an_inert_callback_is_bit_identical(tmp_path, stages):
    results = []

    class AtEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            results.append((weights(pl_module), torch.get_rng_state()))

    for callbacks in ([], [make(*stages)]):
        seed_everything(3)
        module = Small(torch.optim.Adam, lr=0.01)
        quiet_trainer(tmp_path, AtEnd(), *callbacks).fit(module, loader(), loader(1, shuffle=False))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_calibrating_in_mid_training_changes_no_batch_and_no_random_number(tmp_path):
    """A stage that leaves every weight as it was (sparsity 0) leaves the whole training as it was."""
    results = []
    for callbacks in ([], [make(obc.Prune(0.0, at={"epoch": 1}), obc.Prune(0.0, at={"step": 10}))]):
        seed_everything(3)
        module = Small(torch.optim.Adam, lr=0.01)
        trainer = quiet_trainer(tmp_path, *callbacks)
        trainer.fit(module, loader(), loader(1, shuffle=False))
        results.append((weights(module), torch.get_rng_state(), module.training))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_callback_equals_compress_without_a_trainer(tmp_path):
    stages = [obc.Prune("2:4", at="train_end"), obc.Quantize(4, at="train_end")]
    seed_everything(0)
    module, data = Small(), loader()
    before = {}

    class AtEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            before.update(copy.deepcopy(pl_module.state_dict()))

    trainer = quiet_trainer(tmp_path, AtEnd(), make(*stages))
    trainer.fit(module, data)
    plain = Small()
    plain.load_state_dict(before)
    obc.compress(plain, data, stages, calibration=SPEC)
    assert same(weights(module), weights(plain))
    assert not same(before, weights(plain))


def test_validate_compresses_without_training(tmp_path):
    module = Small()
    stages = [obc.Prune("2:4", at="validate"), obc.Quantize(4, at="validate")]
    plain = copy.deepcopy(module)
    callback = make(*stages)
    trainer = quiet_trainer(tmp_path, callback)
    module.calibration_dataloader = lambda: loader(2)
    trainer.validate(module, loader(1, shuffle=False), verbose=False)
    obc.compress(plain, loader(2), stages, calibration=SPEC)
    assert same(weights(module), weights(plain))
    dense, compressed = callback.report.figures["val_loss"]
    assert dense != compressed
    assert dense == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    trainer.validate(module, loader(1, shuffle=False), verbose=False)
    assert compressed == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert same(weights(module), weights(plain)), "the stages must not run twice"
    quiet_trainer(tmp_path).fit(module, loader())  # inference tensors would fail here


def test_calibration_data_comes_from_the_datamodule(tmp_path):
    class Data(LightningDataModule):
        stages = ()

        def setup(self, stage):
            self.stages = (*self.stages, stage)

        def train_dataloader(self):
            assert "fit" in self.stages
            return loader(5)

        def val_dataloader(self):
            return loader(1, shuffle=False)

    module, data = Small(), Data()
    plain = copy.deepcopy(module)
    quiet_trainer(tmp_path, make(obc.Prune("2:4", at="validate"))).validate(module, datamodule=data, verbose=False)
    obc.compress(plain, loader(5), obc.Prune("2:4"), calibration=SPEC)
    assert same(weights(module), weights(plain))

    Data.calibration_dataloader = lambda self: loader(6)
    module = Small()
    plain = copy.deepcopy(module)
    quiet_trainer(tmp_path, make(obc.Prune("2:4", at="validate"))).validate(module, datamodule=data, verbose=False)
    obc.compress(plain, loader(6), obc.Prune("2:4"), calibration=SPEC)
    assert same(weights(module), weights(plain))


def test_checkpoint_loads_into_the_plain_module(tmp_path):
    callback = make(obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(4), save_checkpoint=tmp_path / "small.ckpt")
    module = Small()
    keys = list(module.state_dict())
    fit(module, callback, tmp_path)
    checkpoint = torch.load(callback.checkpoint_path, weights_only=True)
    assert list(checkpoint["state_dict"]) == keys
    plain = Small()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert same(weights(plain), weights(module))
    loaded = Small.load_from_checkpoint(callback.checkpoint_path, strict=True)
    assert same(weights(loaded), weights(module))
    results = [
        quiet_trainer(tmp_path, *callbacks).validate(
            Small(), loader(1, shuffle=False), ckpt_path=callback.checkpoint_path, verbose=False
        )
        for callbacks in ([], [make(*callback.stages)])
    ]
    assert results[0] == results[1]


def test_default_checkpoint_lies_beside_the_others(tmp_path):
    callback = make(obc.Prune("2:4", at="train_end"), save_checkpoint=True)
    fit(Small(), callback, tmp_path)
    assert callback.checkpoint_path == tmp_path / "compressed.ckpt"
    callback = make(obc.Prune("2:4", at="train_end"), save_checkpoint=True)
    trainer = fit(Small(), callback, tmp_path, enable_checkpointing=True)
    assert str(callback.checkpoint_path.parent) == trainer.checkpoint_callback.dirpath
    assert callback.checkpoint_path.exists()


def test_figures_and_logs(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="log")
    callback = make(obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(4), verbose=True)
    trainer = fit(Small(), callback, tmp_path, logger=logger)
    out = capsys.readouterr().out
    for text in ("Plan of Prune(2:4)", "Quantize(int4", "Dense against compressed", "val_loss", "epoch 1, step 6"):
        assert text in out
    assert "12 optimizer steps later" in out
    metrics = trainer.callback_metrics
    assert float(metrics["obc/sparsity"]) == pytest.approx(0.5)
    assert float(metrics["obc/stage"]) == 1
    assert float(metrics["obc/bits"]) == 32
    logger.save()
    rows = (tmp_path / "log" / "version_0" / "metrics.csv").read_text()
    for column in ("obc/conv/relative_error", "obc/fc/loss", "obc/compression_ratio", "obc/loss", "obc/val_loss"):
        assert column in rows.splitlines()[0]
    figures = callback.report.figures["val_loss"]
    module = trainer.lightning_module
    assert quiet_trainer(tmp_path).validate(module, loader(1, shuffle=False), verbose=False)[0]["val_loss"] == (
        pytest.approx(figures[1])
    )


def test_evaluating_aside_leaves_no_trace(tmp_path):
    hooks = []

    class Spy(Callback):
        def on_validation_start(self, trainer, pl_module):
            hooks.append(trainer.current_epoch)

        def on_train_epoch_start(self, trainer, pl_module):
            self.metrics = dict(trainer.callback_metrics)

    class First(Spy):
        pass

    callback = make(obc.Prune("2:4", at={"epoch": 1}), compare=True)
    first, second = First(), Spy()
    trainer = quiet_trainer(tmp_path, first, callback, second, num_sanity_val_steps=0)
    trainer.fit(Small(), loader(), loader(1, shuffle=False))
    assert hooks == [0, 0, 1, 1, 2, 2], "callbacks hear of the ordinary validations only"
    assert first.metrics == second.metrics
    plain = quiet_trainer(tmp_path, num_sanity_val_steps=0)
    plain.fit(Small(), loader(), loader(1, shuffle=False))
    assert trainer.fit_loop.state_dict() == plain.fit_loop.state_dict()


def test_callback_can_be_copied_and_pickled(tmp_path):
    callback = make(obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(4, at={"epoch": 2}, after="train"))

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
                assert twin._state.timetable.done == callback._state.timetable.done
            copy.deepcopy(pl_module)

    fit(Small(), callback, tmp_path, Copy())
    trainer = quiet_trainer(tmp_path, callback)
    trainer.fit(Small(), loader())
    assert len(callback.report.stages) == 2, "another model starts afresh"
    trainer.fit_loop.max_epochs = 5
    trainer.fit(trainer.lightning_module, loader())
    assert len(callback.report.stages) == 2, "the same model does not"


BAD = [
    ([obc.Prune("2:4", at={"epoch": 3})], ScheduleError, "never run"),
    ([obc.Prune("2:4", layers=["nothing"])], LayerNotFoundError, "nothing"),
    ([obc.Prune("3:5")], PatternError, "conv"),
    ([obc.Quantize(4, at={"epoch": 1}), obc.Prune(0.5)], ScheduleError, "Prune"),
]


@pytest.mark.parametrize(("stages", "error", "words"), BAD)
def test_bad_recipes_stop_before_training(tmp_path, stages, error, words):
    module = Small()
    before = weights(module)
    with pytest.raises(error, match=words):
        fit(module, make(*stages), tmp_path)
    assert same(before, weights(module))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ScheduleError, match="order"):
        make(obc.Prune(0.5, at="train_end"), obc.Prune(0.5, at="train_start"))
    with pytest.raises(ScheduleError, match="same layers"):
        fit(Small(), make(obc.Prune("2:4")), tmp_path, make(obc.Quantize(4)))
    broken = Small()
    broken.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="fc"):
        fit(broken, make(obc.Prune("2:4")), tmp_path)
    with pytest.raises(CalibrationError, match="calibration data"):
        quiet_trainer(tmp_path, make(obc.Prune("2:4", at="validate"))).validate(
            Small(), loader(1, shuffle=False), verbose=False
        )


def test_strategies_and_averages_that_cannot_be_held_are_named():
    unknown = SimpleNamespace(strategy=SimpleNamespace())
    with pytest.raises(StrategyError, match="SimpleNamespace"):
        compat.check_strategy(unknown)
    callback = make(obc.Prune("2:4"))
    sharded = SimpleNamespace(
        strategy=ModelParallelStrategy.__new__(ModelParallelStrategy), callbacks=[callback, WeightAveraging()]
    )
    with pytest.raises(StrategyError, match="WeightAveraging with ModelParallelStrategy"):
        compat.behind_averaging(sharded, callback)


def test_resume_refuses_another_recipe_and_another_model(tmp_path):
    callback = make(obc.Prune("2:4", at={"epoch": 1}), save_checkpoint=tmp_path / "a.ckpt")
    fit(Small(), callback, tmp_path)
    with pytest.raises(FingerprintError, match="another recipe"):
        quiet_trainer(tmp_path, make(obc.Prune(0.6, at={"epoch": 1})), max_epochs=5).fit(
            Small(), loader(), ckpt_path=tmp_path / "a.ckpt"
        )
    longer = make(obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(4))
    module = Small()
    trainer = quiet_trainer(tmp_path, longer, max_epochs=5)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert is_two_four(module.conv.weight)
    assert levels(module.fc.weight) <= 16
    assert [report.stage for report in longer.report.stages] == ["Prune(2:4)", "Quantize(int4 asym per channel)"]


def test_unfinished_stages_are_reported(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"before 1 of the compression stages.*Prune\(2:4\)"):
        fit(Small(), make(obc.Prune("2:4", at={"epoch": 2})), tmp_path, Stop())
    with pytest.raises(ScheduleError, match="Nothing was trained"):
        fit(Small(), make(obc.Prune("2:4")), tmp_path, limit_train_batches=0)


def test_fast_dev_run_tries_every_stage(tmp_path):
    module = Small()
    callback = make(obc.Prune("2:4", at={"epoch": 7}), obc.Quantize(4), save_checkpoint=True)
    fit(module, callback, tmp_path, fast_dev_run=True)
    assert len(callback.report.stages) == 2
    assert callback.checkpoint_path is None
