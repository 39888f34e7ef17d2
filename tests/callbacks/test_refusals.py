"""What would silently undo a compression, or pretend one, is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import Small, loader, quiet_trainer

import lightning_obc as obc
from lightning_obc.errors import BackendError, EmptyCalibrationError, FingerprintError

SPEC = obc.Calibration(samples=48)


def recipe(at: str = "train_end", save: bool | Path = False) -> obc.OBCCallback:
    stages = [obc.Prune("2:4", at=at), obc.Quantize(4, at=at)]
    return obc.OBCCallback(stages, SPEC, save_checkpoint=save, verbose=False)


def test_dense_weights_under_a_used_callback_are_refused(tmp_path: Path) -> None:
    model, callback = Small(), recipe()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    quiet_trainer(tmp_path, callback).fit(model, loader(), loader())
    model.load_state_dict(dense)
    with pytest.raises(FingerprintError, match="not those that were compressed"):
        quiet_trainer(tmp_path, callback).fit(model, loader(), loader())


def test_a_dense_checkpoint_under_a_used_callback_is_compressed_again(tmp_path: Path) -> None:
    model, callback = Small(), recipe("train_start")
    plain = quiet_trainer(tmp_path, max_epochs=1)
    plain.fit(Small(), loader(), loader())
    plain.save_checkpoint(tmp_path / "dense.ckpt")
    quiet_trainer(tmp_path, callback).fit(model, loader(), loader())
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(
        model, loader(), loader(), ckpt_path=str(tmp_path / "dense.ckpt"), weights_only=True
    )
    rows = model.fc.weight.detach()
    assert max(len(row.unique()) for row in rows) <= 16
    assert bool(((rows.reshape(-1, 4) != 0).sum(1) <= 2).all())


def test_a_pruned_checkpoint_can_be_quantized_without_training(tmp_path: Path) -> None:
    pruned = obc.OBCCallback([obc.Prune("2:4")], SPEC, save_checkpoint=tmp_path / "pruned.ckpt", verbose=False)
    quiet_trainer(tmp_path, pruned).fit(Small(), loader(), loader())
    model = Small()
    model.train_dataloader = loader  # type: ignore[method-assign]
    again = obc.OBCCallback([obc.Quantize(4, at="validate")], SPEC, save_checkpoint=False, verbose=False)
    quiet_trainer(tmp_path, again).validate(
        model, loader(), ckpt_path=str(tmp_path / "pruned.ckpt"), weights_only=True, verbose=False
    )
    rows = model.fc.weight.detach()
    assert [row.bits for row in again.report.layers.values()] == [4, 4]
    assert max(len(row.unique()) for row in rows) <= 16
    assert bool(((rows.reshape(-1, 4) != 0).sum(1) <= 2).all())


def test_a_saved_file_is_never_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        quiet_trainer(tmp_path, recipe(save=True)).fit(Small(), loader(), loader())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["compressed-v1.ckpt", "compressed.ckpt"]


def test_an_empty_batch_is_no_calibration() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    before = model[0].weight.clone()
    with pytest.raises(EmptyCalibrationError):
        obc.compress(model, [torch.randn(0, 16)], obc.Prune(0.5))
    assert torch.equal(model[0].weight, before)


def test_an_iterator_serves_several_stages() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 16) for _ in range(4)]
    first, second = (torch.nn.Sequential(torch.nn.Linear(16, 4)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    obc.compress(first, iter(batches), [obc.Prune(0.5), obc.Quantize(4)])
    obc.compress(second, batches, [obc.Prune(0.5), obc.Quantize(4)])
    assert torch.equal(first[0].weight, second[0].weight)


def test_a_backend_that_cannot_run_here_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    with pytest.raises(BackendError, match="triton"):
        obc.compress(model, [torch.randn(8, 16)], obc.Prune(0.5, backend="triton"))


def test_dead_columns_are_reported() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    batch = torch.randn(32, 16)
    batch[:, :8] = 0.0
    assert "8 dead columns" in obc.compress(model, [batch], obc.Prune(0.5)).table()
