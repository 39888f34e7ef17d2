"""Callbacks for models that no OBCCallback has compressed: figures, norm statistics, zeros that stay."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_obc as obc
from lightning_obc.errors import LayerNotFoundError, SpecError
from tests.callbacks.small import Small, TwoOptimizers, loader, quiet_trainer, same, weights


def magnitude_pruned(module: Small) -> Small:
    """Half of the weights of both layers at zero, by magnitude: as some other tool leaves them."""
    with torch.no_grad():
        for layer in (module.conv, module.fc):
            layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0.0
    return module


def zeros(module: Small) -> dict[str, torch.Tensor]:
    return {name: getattr(module, name).weight == 0 for name in ("conv", "fc")}


def holds(module: Small, mask: dict[str, torch.Tensor]) -> bool:
    return all(bool((getattr(module, name).weight[where] == 0).all()) for name, where in mask.items())


def rows(folder) -> list[dict[str, str]]:
    (file,) = Path(folder).rglob("metrics.csv")
    return list(csv.DictReader(file.open()))


OPTIMIZERS = [
    (Small, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (Small, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (TwoOptimizers, torch.optim.Adam, {"lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "optimizer", "options"), OPTIMIZERS)
def test_guarded_zeros_stay_and_the_rest_trains(tmp_path, kind, optimizer, options):
    module = magnitude_pruned(kind(optimizer, **options))
    mask, before = zeros(module), weights(module)
    guard = obc.MaskGuard()
    quiet_trainer(tmp_path, guard, max_epochs=2).fit(module, loader())
    assert holds(module, mask)
    assert {name: int((~kept).sum()) for name, kept in guard.masks.items()} == {
        n: int(z.sum()) for n, z in mask.items()
    }
    assert module.state_dict().keys() == before.keys()
    for name, where in mask.items():
        moved = getattr(module, name).weight != before[f"{name}.weight"]
        assert bool(moved[~where].any())


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1)]
)
def test_averages_of_guarded_weights_have_their_zeros(tmp_path, averaging):
    module = magnitude_pruned(Small(torch.optim.SGD, lr=0.1, momentum=0.9))
    mask, before = zeros(module), weights(module)
    quiet_trainer(tmp_path, obc.MaskGuard(), averaging()).fit(module, loader())
    assert holds(module, mask)
    assert not same(weights(module), before)


def test_without_the_guard_the_zeros_are_lost(tmp_path):
    module = magnitude_pruned(Small(lr=0.1))
    mask = zeros(module)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert not holds(module, mask)


def test_an_unpruned_model_trains_as_without_the_guard(tmp_path):
    torch.manual_seed(0)
    plain = Small(lr=0.1)
    guarded = Small(lr=0.1)
    guarded.load_state_dict(plain.state_dict())
    for module, callbacks in ((plain, []), (guarded, [obc.MaskGuard()])):
        torch.manual_seed(1)
        quiet_trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader())
    assert same(weights(plain), weights(guarded))


def test_a_guarded_run_resumes_with_its_masks(tmp_path):
    def start():
        torch.manual_seed(0)
        return magnitude_pruned(Small(torch.optim.SGD, lr=0.1, momentum=0.9))

    whole = start()
    torch.manual_seed(1)
    quiet_trainer(tmp_path, obc.MaskGuard(), max_epochs=2).fit(whole, loader())

    part = start()
    mask = zeros(part)
    torch.manual_seed(1)
    trainer = quiet_trainer(tmp_path, obc.MaskGuard(), max_epochs=2, max_steps=6)
    trainer.fit(part, loader())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    state = torch.load(tmp_path / "part.ckpt", weights_only=True)
    assert state["state_dict"].keys() == part.state_dict().keys()

    # A weight that happens to be zero at the stop is no reason to hold it: masks come from the state.
    later = Small(torch.optim.SGD, lr=0.1, momentum=0.9)
    guard = obc.MaskGuard()
    quiet_trainer(tmp_path, guard, max_epochs=2).fit(later, loader(), ckpt_path=tmp_path / "part.ckpt")
    assert holds(later, mask)
    assert all(
        torch.equal(~guard.masks[name].reshape(where.shape), where) for name, where in mask.items() if name == "fc"
    )
    pickle.loads(pickle.dumps(guard))


def test_a_second_fit_takes_its_masks_anew(tmp_path):
    guard = obc.MaskGuard()
    quiet_trainer(tmp_path, guard, max_epochs=1).fit(magnitude_pruned(Small(lr=0.1)), loader())
    dense = Small(lr=0.1)
    with pytest.warns(UserWarning, match="found no zeros to keep"):
        quiet_trainer(tmp_path, guard, max_epochs=1).fit(dense, loader())
    assert guard.masks == {}


def test_layers_of_zeros_alone_are_fresh_not_pruned(tmp_path):
    module = magnitude_pruned(Small(lr=0.1))
    nn.init.zeros_(module.fc.weight)
    guard = obc.MaskGuard()
    with pytest.warns(UserWarning, match="leaves layers free that hold nothing but zeros: fc"):
        quiet_trainer(tmp_path, guard, max_epochs=1).fit(module, loader())
    assert set(guard.masks) == {"conv"}
    assert bool((module.fc.weight != 0).any())


def test_the_guard_chooses_layers(tmp_path):
    module = magnitude_pruned(Small(lr=0.1))
    mask = zeros(module)
    module.fc.weight.data[:] = torch.where(torch.rand_like(module.fc.weight) < 0.1, 0.0, 1.0)
    guard = obc.MaskGuard(min_sparsity=0.3)
    quiet_trainer(tmp_path, guard, max_epochs=1).fit(module, loader())
    assert set(guard.masks) == {"conv"}
    assert holds(module, {"conv": mask["conv"]})
    with pytest.raises(LayerNotFoundError, match="covn"):
        quiet_trainer(tmp_path, obc.MaskGuard(layers=["covn"])).fit(module, loader())
    with pytest.raises(SpecError, match="min_sparsity"):
        obc.MaskGuard(min_sparsity=1.0)


def test_the_guard_and_a_stage_share_a_layer(tmp_path):
    module = magnitude_pruned(Small(lr=0.1))
    mask = zeros(module)
    stages = [obc.Prune(0.75, at={"epoch": 1}), obc.Quantize(4)]
    callback = obc.OBCCallback(stages, obc.Calibration(samples=16), save_checkpoint=False, verbose=False)
    quiet_trainer(tmp_path, callback, obc.MaskGuard(), max_epochs=2).fit(module, loader())
    assert holds(module, mask)
    assert float((module.conv.weight == 0).double().mean()) >= 0.75


def test_figures_of_any_model_are_logged_and_can_be_monitored(tmp_path, capsys):
    module = magnitude_pruned(Small(lr=0.1))
    monitor = obc.CompressionMonitor(patterns=["2:4", "1:2"], verbose=True)
    best = ModelCheckpoint(dirpath=str(tmp_path / "files"), monitor="compression/sparsity", mode="max")
    logger = CSVLogger(tmp_path, "logs")
    trainer = quiet_trainer(
        tmp_path, obc.MaskGuard(), monitor, best, max_epochs=2, logger=logger, enable_checkpointing=True
    )
    trainer.fit(module, loader(), loader(1))

    logged = rows(tmp_path / "logs")
    first = next(row for row in logged if row["compression/sparsity"])
    sparsity = sum(int(where.sum()) for where in zeros(module).values()) / (4 * 8 * 9 + 32)
    assert float(first["compression/sparsity"]) == pytest.approx(sparsity, abs=1e-6)
    assert float(first["compression/bits"]) == 32
    assert float(first["compression/ratio"]) == pytest.approx(monitor.inspection.compression_ratio, rel=1e-5)
    assert 0 < float(first["compression/2to4"]) < 1
    assert float(first["compression/conv/sparsity"]) == pytest.approx(float((module.conv.weight == 0).double().mean()))
    assert float(best.best_model_score) == pytest.approx(sparsity, abs=1e-6)
    assert "Weights of 2 layers: sparsity" in capsys.readouterr().out
    trainer.validate(module, loader(1), verbose=False)
    assert "groups" in monitor.table()


def test_a_quantized_model_is_seen_without_its_history(tmp_path):
    module = Small()
    obc.compress(module, loader(), [obc.Prune("2:4"), obc.Quantize(4)], calibration=obc.Calibration(samples=16))
    monitor = obc.CompressionMonitor(per_layer=False, prefix="size")
    logger = CSVLogger(tmp_path, "logs")
    quiet_trainer(tmp_path, monitor, logger=logger).validate(module, loader(1), verbose=False)
    assert monitor.inspection.bits == 4
    assert monitor.inspection.conformity == {"2:4": 1.0}
    (row,) = [row for row in rows(tmp_path / "logs") if row.get("size/bits")]
    assert (float(row["size/bits"]), float(row["size/2to4"])) == (4, 1)
    assert not any("/conv/" in key for key in row)


def test_the_monitor_refuses_what_it_cannot_look_for(tmp_path):
    with pytest.raises(SpecError, match="Only N:M patterns"):
        quiet_trainer(tmp_path, obc.CompressionMonitor(patterns=["0.5"])).fit(Small(), loader())
    with pytest.raises(SpecError, match="every_n_epochs"):
        obc.CompressionMonitor(every_n_epochs=0)


@pytest.fixture
def stale():
    """A model whose running statistics belong to other weights."""
    torch.manual_seed(0)
    module = Small(lr=0.0)
    module.norm.running_mean.fill_(3.0)
    return module


def true_statistics(module: Small) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over all calibration values of each channel, by definition."""
    with torch.no_grad():
        images = torch.cat([batch[0] for batch in loader(shuffle=False)])
        values = module.conv(images).transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


def is_true(module: Small) -> bool:
    mean, variance = true_statistics(module)
    # The average of unbiased variances of batches of 8·36 values is of another divisor than one over all.
    return torch.allclose(module.norm.running_mean, mean, atol=1e-5) and torch.allclose(
        module.norm.running_var, variance, rtol=0.02
    )


ALL = obc.Calibration(samples=48)


@pytest.mark.parametrize("at", ["train_start", {"epoch": 1}, "train_end", ["validation", "train_end"]])
def test_statistics_are_measured_at_their_time(tmp_path, stale, at):
    reset = obc.BatchNormReset(at, calibration=ALL)
    seen = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.setdefault(trainer.current_epoch, reset.report is not None)

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                seen["validation"] = is_true(module)

    stale.norm.momentum = 0.0  # Training leaves the statistics alone: only the reset moves them.
    quiet_trainer(tmp_path, reset, Look(), max_epochs=2).fit(stale, loader(shuffle=False), loader(1))
    assert is_true(stale)
    assert seen[0] == (at == "train_start")
    assert seen[1] == (at != "train_end")
    assert seen["validation"] == (at != "train_end")


def test_statistics_are_measured_before_a_validation_and_leave_no_inference_tensors(tmp_path, stale, capsys):
    reset = obc.BatchNormReset("validate", calibration=ALL, verbose=True)
    trainer = quiet_trainer(tmp_path, reset, max_epochs=1)
    stale.train_dataloader = lambda: loader(shuffle=False)
    before = trainer.validate(stale, loader(1), verbose=False)[0]["val_loss"]
    assert is_true(stale)
    assert "norm" in capsys.readouterr().out
    again = quiet_trainer(tmp_path).validate(stale, loader(1), verbose=False)[0]["val_loss"]
    assert before == pytest.approx(again, rel=1e-5)
    quiet_trainer(tmp_path, max_epochs=1).fit(stale, loader())


def test_a_reset_does_not_disturb_training(tmp_path):
    runs = []
    for callbacks in ([], [obc.BatchNormReset("validation", calibration=ALL)]):
        torch.manual_seed(0)
        module = Small(lr=0.1)
        torch.manual_seed(1)
        quiet_trainer(tmp_path, *callbacks, max_epochs=2).fit(module, loader(), loader(1))
        runs.append(
            {name: value for name, value in weights(module).items() if "norm.r" not in name and "num" not in name}
        )
    assert same(*runs)


@pytest.mark.parametrize("at", ["never", {"step": 3}, {"epoch": -1}, ["train_end", 5]])
def test_unknown_times_are_refused(at):
    with pytest.raises(SpecError, match="A time of BatchNormReset"):
        obc.BatchNormReset(at)


def test_a_model_without_norms_is_refused_before_anything_runs(tmp_path):
    class Plain(Small):
        def __init__(self):
            super().__init__()
            self.norm = nn.Identity()

    with pytest.raises(LayerNotFoundError, match="no normalisation layer"):
        quiet_trainer(tmp_path, obc.BatchNormReset()).fit(Plain(), loader())
