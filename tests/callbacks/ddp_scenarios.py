"""What every rank of a DDP test does; see ``processes.py``. Without ``OBC_TEST_RANKS``, the same on one device."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from small import Small, loader, quiet_trainer, weights
from torch import nn

import lightning_obc as obc
from lightning_obc.callbacks.passes import check_sharded
from lightning_obc.errors import NonFiniteError, RankError, StrategyError

CALIBRATION = obc.Calibration(samples=44, batch_size=8)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    size = int(os.environ.get("OBC_TEST_RANKS", "1"))
    if size > 1:
        options |= {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=150))}
    return quiet_trainer(os.environ["OBC_TEST_FOLDER"], *callbacks, devices=size, **options)


def small(**options: Any) -> Small:
    torch.manual_seed(0)
    return Small(**options)


def result(module: LightningModule, callback: obc.OBCCallback) -> dict[str, Any]:
    report = callback.report
    assert report is not None
    return {
        "weights": weights(module),
        "losses": {name: layer.loss for name, layer in report.layers.items()},
        "samples": [stage.samples for stage in report.stages],
        "work": [[vars(share) for share in stage.work] for stage in report.stages],
        "figures": dict(report.figures),
        "masks": {name: layer.mask for name, layer in callback._state.held.layers.items()},
        "checkpoint": callback.checkpoint_path,
    }


def validated(stages: list[Any], calibration: obc.Calibration = CALIBRATION, **options: Any) -> dict[str, Any]:
    """Compress an untrained model in ``trainer.validate``, so that one device starts from the same weights."""
    module, callback = small(), obc.OBCCallback(stages, calibration=calibration, verbose=False, **options)
    trainer(callback).validate(module, [loader(1, shuffle=False)], verbose=False)
    return result(module, callback)


class Source(Small):
    """Has a calibration loader of its own, for ``trainer.validate``."""

    def calibration_dataloader(self) -> Any:
        return loader(2)


def small_source() -> Source:
    torch.manual_seed(0)
    return Source()


def agreement() -> dict[str, Any]:
    """The same recipe with any number of ranks."""
    stages = [
        obc.Prune(0.5, at="validate", damping="auto"),
        obc.Quantize(4, at="validate"),
        obc.Correct("statistics", at="validate"),
    ]
    module = small_source()
    callback = obc.OBCCallback(stages, calibration=CALIBRATION, verbose=False)
    trainer(callback).validate(module, loader(1, shuffle=False), verbose=False)
    return result(module, callback)


def shared_work() -> dict[str, Any]:
    """Nine layers for all ranks there are, without a Trainer, from batches of which no two have the same size."""
    generator, names = torch.Generator().manual_seed(3), (0, 2, 4, 6, 8, 10, 12, 14, 16)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in names for layer in (nn.Linear(48, 48), nn.Tanh())))
    batches = [torch.randn(size, 48, generator=generator) for size in (7, 40, 13, 32, 5, 24, 30, 9)]
    stages = [obc.Prune(0.5), obc.Quantize(4)]
    report = obc.compress(model, batches, stages, calibration=obc.Calibration(samples=160), ranks=obc.all_ranks())
    return {
        "weights": weights(model),
        "losses": [[layer.loss for layer in stage.layers] for stage in report.stages],
        "masks": {name: solution.mask for name, solution in report.stages[0].solutions.items()},
        "samples": [stage.samples for stage in report.stages],
        "work": [[share.flops for share in stage.work] for stage in report.stages],
        "layers": [[share.layers for share in stage.work] for stage in report.stages],
    }


def four_ranks() -> dict[str, Any]:
    return {"agreement": agreement(), "shared work": shared_work()}


def fit() -> dict[str, Any]:
    """Pruning in the middle of training, quantization and batch-norm reset at its end, behind compiled modules."""
    stages = [obc.Prune("2:4", at={"epoch": 1}, layers=["conv"]), obc.Quantize(4), obc.Correct("batch_norm")]
    folder = Path(os.environ["OBC_TEST_FOLDER"])
    module = small(optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
    module.conv = torch.compile(module.conv, backend="eager")  # type: ignore[assignment]
    callback = obc.OBCCallback(stages, calibration=CALIBRATION, store=folder / "solved")
    logger = CSVLogger(folder)
    run = trainer(callback, max_epochs=3, logger=logger, enable_checkpointing=True)
    run.fit(module, loader(0), loader(1, shuffle=False))
    return result(module, callback)


def failures() -> dict[str, Any]:
    """A batch that is not finite on one rank only; weights that one rank alone has changed."""
    found: dict[str, Any] = {}

    class Broken(Source):
        def calibration_step(self, batch: Any) -> Any:
            factor = float("nan") if self.global_rank == 1 else 1.0
            return self(batch[0] * factor)

    class Other(Source):
        def setup(self, stage: str) -> None:
            self.fc.bias.data += self.global_rank

        def on_validation_start(self) -> None:
            nn.init.constant_(self.fc.bias, float(self.global_rank))

    for name, kind in (("broken", Broken), ("other", Other)):
        torch.manual_seed(0)
        module = kind()
        callback = obc.OBCCallback([obc.Prune(0.5, at="validate")], calibration=CALIBRATION, verbose=False)
        try:
            trainer(callback).validate(module, loader(1, shuffle=False), verbose=False)
        except (NonFiniteError, RankError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        found[f"{name} is dense"] = bool((module.conv.weight != 0).all())
    return found


def companions() -> dict[str, Any]:
    """Zeros that are there already, a stage after a plateau of figures that differ between ranks, and its best file."""
    module, folder = small(lr=0.05, momentum=0.9), Path(os.environ["OBC_TEST_FOLDER"])
    with torch.no_grad():
        module.fc.weight[:, ::2] = 0.0
    at = obc.Plateau("val_loss", patience=1, min_delta=100.0)
    stage = obc.Quantize(3, at=at, layers=["conv"])
    callback = obc.OBCCallback([stage], CALIBRATION, verbose=False, save_checkpoint=False, compare=False)
    files = obc.CompressedCheckpoint(str(folder / "files"), monitor="val_loss")
    guard, monitor = obc.MaskGuard(layers=["fc"]), obc.CompressionMonitor()
    run = trainer(callback, guard, monitor, files, max_epochs=4, enable_checkpointing=True, num_sanity_val_steps=0)
    run.fit(module, loader(0), loader(1, shuffle=False))
    try:
        trainer(obc.BatchNormReset()).validate(module, loader(1, shuffle=False), verbose=False)
        refused = ""
    except StrategyError as error:
        refused = str(error)
    return {
        "weights": weights(module),
        "masks": guard.masks,
        "best": files.best_model_path,
        "score": float(files.best_model_score),
        "when": callback._state.dense_when,
        "refused": refused,
    }


def two_ranks() -> dict[str, Any]:
    """All scenarios in one start of the processes, which takes longer than they do."""
    found = {"agreement": agreement(), "fit": fit(), "failures": failures(), "sharded": sharded()}
    return found | {"companions": companions(), "shared work": shared_work()}


class Sharded(Source):
    """Its parameters are sharded over ranks by ``fully_shard``."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.conv, mesh=mesh)
            fully_shard(self, mesh=mesh)


def sharded() -> dict[str, Any]:
    """Five batches for two ranks; zeros and a frozen grid that must hold while the shards are trained."""
    stages = [
        obc.Prune("2:4", at="train_start", layers=["conv"]),
        obc.Quantize(4, at={"epoch": 1}, layers=["conv"]),
        obc.Quantize(4, layers=["fc"]),
        obc.Correct("batch_norm"),
    ]
    size, options = int(os.environ.get("OBC_TEST_RANKS", "1")), {}
    if size > 1:
        options["strategy"] = ModelParallelStrategy(
            data_parallel_size=size,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            timeout=timedelta(seconds=150),
        )
    torch.manual_seed(0)
    module = Sharded(torch.optim.SGD, lr=0.1, momentum=0.9)
    callback = obc.OBCCallback(stages, calibration=obc.Calibration(samples=40, batch_size=8))
    run = quiet_trainer(os.environ["OBC_TEST_FOLDER"], callback, devices=size, max_epochs=3, **options)
    run.fit(module, loader(0), loader(1, shuffle=False))
    report, state = callback.report, module.state_dict()
    assert report is not None
    refused = {}
    for name, stage, calibration in (
        ("mode", obc.Prune(0.5), obc.Calibration(mode="sequential")),
        ("correction", obc.Correct("statistics"), CALIBRATION),
        ("after", obc.Quantize(4, after="train"), CALIBRATION),
    ):
        try:
            check_sharded(module, [stage], calibration)
        except StrategyError as error:
            refused[name] = str(error)
    return {
        "weights": {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()},
        "sharded": [key for key, value in state.items() if hasattr(value, "full_tensor")],
        "losses": [{layer.name: layer.loss for layer in stage.layers} for stage in report.stages],
        "samples": [stage.samples for stage in report.stages],
        "refused": refused,
        "checkpoint": callback.checkpoint_path,
    }
