"""Calibration that cannot work ends a run when it begins; the look at it leaves no trace."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from small import Small, is_two_four, levels, loader, quiet_trainer, same, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

import lightning_obc as obc
from lightning_obc.errors import CalibrationError, EmptyCalibrationError, LayerNotReachedError, ScheduleError

SPEC = obc.Calibration(samples=16)
AT_END = (obc.Prune("2:4"), obc.Quantize(4))


def make(*stages: Any, **options: Any) -> obc.OBCCallback:
    options = {"verbose": False, "save_checkpoint": False} | options
    return obc.OBCCallback(list(stages or AT_END), SPEC, **options)


class Counting(Small):
    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return self.loss(batch)


class Autoencoder(Counting):
    """Its decoder is called outside of the forward pass, with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward((self.decoder(self(batch[0])) - batch[0].mean((2, 3))).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = [*self.conv.parameters(), *self.norm.parameters(), *self.fc.parameters()]
        return [torch.optim.Adam(first), torch.optim.Adam(self.decoder.parameters())]


class Lengths(Counting):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * lengths

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], torch.ones(1)), batch[1])


def empty() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(0, 4, 6, 6), torch.zeros(0, dtype=torch.long)), batch_size=4)


@pytest.mark.parametrize("at", ["train_end", {"epoch": 2}, "validate"])
@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        (Autoencoder, LayerNotReachedError, r"Prune\(2:4\) of decoder.0, decoder.2.*exclude=\['decoder.0', 'decoder"),
        (Lengths, CalibrationError, r"missing 1 required positional argument: 'lengths'.*calibration_step"),
    ],
)
def test_calibration_that_cannot_work_ends_the_run_at_its_start(
    tmp_path: Path, at: Any, kind: type[Counting], error: type[Exception], told: str
) -> None:
    model, callback = kind(), make(obc.Prune("2:4", at=at))
    before, trainer = weights(model), quiet_trainer(tmp_path, callback)
    model.validation_step = lambda *_: pytest.fail("too late")  # type: ignore[method-assign]
    run, data = (trainer.validate, loader(1, shuffle=False)) if at == "validate" else (trainer.fit, loader())
    model.train_dataloader = loader  # type: ignore[method-assign]
    with pytest.raises(error, match=told):
        run(model, data)
    assert model.steps == 0
    assert same(before, weights(model))
    if kind is Autoencoder and at == "train_end":
        quiet_trainer(tmp_path, make(obc.Prune("2:4", exclude=["decoder"])), max_epochs=1).fit(model, loader())
        assert is_two_four(model.conv.weight)


def test_an_empty_calibration_loader_ends_the_run_at_its_start(tmp_path: Path) -> None:
    model = Counting()
    model.calibration_dataloader = empty  # type: ignore[assignment]
    with pytest.raises(EmptyCalibrationError, match="DataLoader of 0 batches over TensorDataset of 0 samples"):
        quiet_trainer(tmp_path, make()).fit(model, loader())
    assert model.steps == 0
    with pytest.raises(EmptyCalibrationError, match="DataLoader of 0 batches"):
        quiet_trainer(tmp_path, make()).fit(Counting(), empty())


def test_a_model_that_cannot_run_before_it_is_trained_needs_no_look(tmp_path: Path) -> None:
    class Untrained(Counting):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training and self.steps == 0:
                raise RuntimeError("not trained yet")
            return super().forward(x)

    with pytest.raises(CalibrationError, match="not trained yet"):
        quiet_trainer(tmp_path, make()).fit(Untrained(), loader())
    model = Untrained()
    quiet_trainer(tmp_path, make(check_calibration=False), max_epochs=1).fit(model, loader())
    assert is_two_four(model.conv.weight)


class Restless(Small):
    """Leaves traces wherever a forward pass can: parameters, buffers, attributes, lists, all generators; and logs."""

    def __init__(self) -> None:
        super().__init__(torch.optim.Adam, lr=0.01)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))
        self.started, self.seen = False, list[float]()
        self.own = np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            self.scale.data.copy_(x.std())
            self.started, self.cache = True, x
        self.calls += 1
        self.seen.append(float(x.mean()))
        x = x + 0.01 * (random.random() + np.random.rand() + self.own.random() + torch.rand(1))
        if self.training:
            self.log("seen", float(len(self.seen)))
        return super().forward(x * self.scale)

    def train_dataloader(self) -> DataLoader[Any]:
        part, _ = random_split(Moody(), [24, 8])
        return DataLoader(part, batch_sampler=InPlace(24))


class Moody(Dataset[Any]):
    def __init__(self) -> None:
        self.own, self.calls, self.generator = random.Random(2), 0, torch.Generator().manual_seed(4)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.calls += 1
        x = torch.full((4, 6, 6), index + 0.1 * self.own.random() + 0.01 * self.calls)
        return x + torch.randn(x.shape) + torch.randn(x.shape, generator=self.generator), index % 4


class InPlace:
    """A batch sampler that shuffles the list that it keeps."""

    def __init__(self, size: int) -> None:
        self.order = list(range(size))

    def __iter__(self) -> Iterator[list[int]]:
        random.shuffle(self.order)
        return (self.order[i : i + 8] for i in range(0, len(self.order), 8))

    def __len__(self) -> int:
        return len(self.order) // 8


@pytest.mark.parametrize("stage", [obc.Prune(0.5), obc.Quantize(4, edges=8)])
def test_the_look_leaves_no_trace(tmp_path: Path, stage: Any) -> None:
    """Model, data and generators of every kind, up to the end of a training whose stages have not run by then."""
    results: list[Any] = []

    class AtEnd(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            assert all(not module._forward_pre_hooks for module in pl_module.modules())
            assert pl_module.seen == []
            assert not pl_module.started
            assert "log" not in vars(pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            states = random.random(), np.random.rand(), torch.rand(1).item(), pl_module.own.random()
            results.append((weights(pl_module), states, list(pl_module.seen), pl_module.training))

    for callbacks in ([], [make(stage)]):
        seed_everything(3)
        np.random.seed(5)
        quiet_trainer(tmp_path, AtEnd(), *callbacks).fit(Restless())
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Can be read only once."""

    def __init__(self) -> None:
        self.left, self.reads = list(loader(shuffle=False).dataset), 0

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            self.reads += 1
            yield self.left.pop(0)


def test_what_can_be_read_only_once_is_not_read_beforehand(tmp_path: Path) -> None:
    seen = []

    class Notes(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[0].clone())
            return self.loss(batch)

    inert = obc.Quantize(4, at={"step": 99}, edges=8)
    for callbacks in ([], [make(inert)]):
        seed_everything(3)
        quiet_trainer(tmp_path, *callbacks, max_epochs=1).fit(Notes(), DataLoader(Stream(), batch_size=8))
    assert len(seen) == 12
    assert all(torch.equal(a, b) for a, b in zip(seen[:6], seen[6:], strict=True))
    model = Lengths()
    with pytest.raises(CalibrationError, match="'lengths'"):
        quiet_trainer(tmp_path, make(inert)).fit(model, DataLoader(Stream(), batch_size=8))
    assert model.steps == 0, "the first training batch tells it"
    with pytest.warns(UserWarning, match=r"first training batch does not reach.*of decoder.0, decoder.2"):
        quiet_trainer(tmp_path, make(obc.Prune(0.5, at={"step": 99})), max_epochs=1).fit(
            Autoencoder(), DataLoader(Stream(), batch_size=8)
        )


def test_a_layer_that_only_a_later_batch_reaches_is_reached(tmp_path: Path) -> None:
    class Rare(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.spare(y) if x.max() > 1000 else y

    model, data = Rare(), loader(shuffle=False)
    batches = list(data)
    batches[1][0][0, 0, 0, 0] = 2000.0
    model.calibration_dataloader = lambda: batches  # type: ignore[assignment]
    quiet_trainer(tmp_path, make(obc.Prune("2:4")), max_epochs=1).fit(model, data)
    assert is_two_four(model.spare.weight)


def test_a_fit_that_trains_nothing_is_an_error_that_names_the_stages(tmp_path: Path) -> None:
    model = Small()
    model.calibration_dataloader = loader  # type: ignore[assignment]
    for options, data, told in (
        ({}, empty(), "a train loader without a batch"),
        ({"limit_train_batches": 0}, loader(), r"Trainer\(limit_train_batches=0\)"),
        ({"max_epochs": 0}, loader(), r"max_epochs=0"),
    ):
        with pytest.raises(
            ScheduleError, match=rf"{told}.*Prune\(2:4\) at train_end; Quantize.*lightning-obc compress"
        ):
            quiet_trainer(tmp_path, make(), **options).fit(model, data)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*will not run.*")
        quiet_trainer(tmp_path, make(obc.Prune(0.5, at={"step": 6})), max_epochs=1).fit(Small(), loader())
    late = make(obc.Prune(0.5, at={"step": 7}))
    with pytest.warns(UserWarning, match=r"no more than 6 optimizer steps: Prune\(0.5\) at \{'step': 7\} will not run"):
        quiet_trainer(tmp_path, late, max_epochs=1).fit(Small(), loader())
    assert [str(stage) for stage in late.stages_left] == ["Prune(0.5)"]


class Adversarial(Small):
    """A generator and a discriminator, each with its optimizer, as in the usual tutorial of manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 4), nn.Linear(4, 1))
        del self.conv, self.norm, self.drop, self.fc

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def calibration_step(self, batch: Any) -> Tensor:
        real = batch[0].mean((2, 3))
        return self.discriminator(torch.cat([real, self(torch.randn(len(real), 8))]))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real = batch[0].mean((2, 3))
        fake = self(torch.randn(len(real), 8))
        self.toggle_optimizer(second)
        loss = (self.discriminator(fake.detach()) - self.discriminator(real)).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        first.step()
        self.untoggle_optimizer(first)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), 0.01, betas=(0.5, 0.9)),
            torch.optim.Adam(self.discriminator.parameters(), 0.01, betas=(0.5, 0.9)),
        ]


def test_a_gan_with_two_optimizers_is_pruned_trained_on_and_quantized(tmp_path: Path) -> None:
    model, held = Adversarial(), []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.current_epoch >= 1:
                linear = [m for m in pl_module.modules() if isinstance(m, nn.Linear)]
                held.append((all(is_two_four(m.weight) for m in linear), linear[0].weight.clone()))

    stages = [obc.Prune("2:4", at={"epoch": 1}), obc.Quantize(4)]
    callback = make(*stages, on_failure="raise", save_checkpoint=tmp_path / "gan.ckpt")
    quiet_trainer(tmp_path, Look(), callback).fit(model, loader())
    assert len(held) == 12
    assert all(fits for fits, _ in held)
    assert not torch.equal(held[0][1], held[-1][1]), "the free weights train on"
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(is_two_four(m.weight) and levels(m.weight) <= 16 for m in linear)
    assert [len(stage.layers) for stage in callback.report.stages] == [5, 5]
    del Adversarial.calibration_step
    with pytest.raises(CalibrationError, match=r"'generator.0' \(Linear\), which gets \[8, 4, 6, 6\] float32"):
        quiet_trainer(tmp_path, make()).fit(Adversarial(), loader())
