"""Scikit-learn's handwritten digits and a small residual CNN: real data and a real network, with no download.

    lightning-obc fit --config configs/digits.yaml

trains the network, prunes it 2:4, lets it recover, quantizes it to 4 bits and compares it with the dense network.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

CHECKPOINT = "outputs/digits.ckpt"


class DigitsData(L.LightningDataModule):
    """The 1797 images of 8×8 pixels, split once and for all into 1197 for training, 300 and 300.

    Args:
        batch_size: Images per batch.
        split_seed: Seed of the split; it is independent of the seed of the training.
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
        data = TensorDataset(images, torch.tensor(digits.target))
        generator = torch.Generator().manual_seed(self.hparams["split_seed"])
        self.train, self.val, self.test = random_split(data, [1197, 300, 300], generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=300)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=300)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=300)


class Residual(nn.Module):
    """Two 3×3 convolutions with batch-norm around a shortcut; a stride or a new width makes it a 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _decay(epoch: int, epochs: int, floor: float) -> float:
    """Linear decay over ``epochs``, then constant: what comes later is the recovery from compression."""
    return max(1 - epoch / epochs, floor)


class DigitsClassifier(L.LightningModule):
    """A residual CNN of about 76 000 weights for images ``[batch, 1, 8, 8]``.

    Args:
        widths: Channels of the three stages.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        decay_epochs: Epochs over which the learning rate decays; it stays at 3 % of its peak from then on.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (16, 32, 64),
        lr: float = 0.01,
        weight_decay: float = 0.01,
        decay_epochs: int = 12,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        first, second, third = widths
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.Sequential(Residual(first, first), Residual(first, second, 2), Residual(second, third, 2))
        self.head = nn.Linear(third, 10)
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        hparams = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"])
        decay = functools.partial(_decay, epochs=hparams["decay_epochs"], floor=0.03)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, decay)]


def trained(checkpoint: str = CHECKPOINT) -> tuple[DigitsClassifier, DigitsData]:
    """The network after 12 epochs and its data: from the checkpoint, or trained now (8 s) and saved there.

    Args:
        checkpoint: File that the other examples share.
    """
    data, path = DigitsData(), Path(checkpoint)
    if not path.is_file():
        L.seed_everything(0)
        trainer = quiet_trainer(max_epochs=12)
        trainer.fit(DigitsClassifier(), data)
        trainer.save_checkpoint(path, weights_only=True)
    data.setup("fit")
    return DigitsClassifier.load_from_checkpoint(path, map_location="cpu").eval(), data


def quiet_trainer(**options: Any) -> L.Trainer:
    """A Trainer on the CPU that writes nothing and prints no bars."""
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **silent, **options)


@torch.no_grad()
def accuracy(model: nn.Module, data: DigitsData) -> float:
    """Share of the 300 test images that a model gets right."""
    images, labels = next(iter(data.test_dataloader()))
    return float((model.eval()(images).argmax(1) == labels).double().mean())
