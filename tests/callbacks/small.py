"""A small network and data for the tests of the callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def loader(seed: int = 0, *, shuffle: bool = True, samples: int = 48, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 4, 6, 6, generator=generator)
    data = TensorDataset(images, images.mean((2, 3)).argmax(1))
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


class Resumable(DataLoader[Any]):
    """A loader that goes on where it was, as Lightning needs it to resume within an epoch."""

    start, done = 0, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        first, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.done = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"]


def resumable() -> Resumable:
    plain = loader(shuffle=False)
    return Resumable(plain.dataset, batch_size=plain.batch_size)


class Small(LightningModule):
    """A convolution, batch-norm, dropout and a linear layer; ``optimizer`` makes its optimizers."""

    def __init__(self, optimizer: Any = None, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 4)
        self.make, self.options = optimizer or torch.optim.SGD, options or {"lr": 0.1}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), **self.options)


class TwoOptimizers(Small):
    """Manual optimization; one optimizer for each layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = [*self.conv.parameters(), *self.norm.parameters()]
        return [self.make(first, **self.options), self.make(self.fc.parameters(), **self.options)]


def quiet_trainer(tmp_path: Any, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**(defaults | options), callbacks=list(callbacks))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_two_four(weight: Tensor) -> bool:
    """At most 2 non-zeros in each group of 4 input channels of a Linear or Conv2d weight."""
    groups = weight.movedim(1, -1).reshape(-1, 4)
    return bool(((groups != 0).sum(1) <= 2).all())


def levels(weight: Tensor) -> int:
    """Most distinct values in any row."""
    return max(len(row.unique()) for row in weight.flatten(1))
