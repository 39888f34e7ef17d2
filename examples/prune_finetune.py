"""2:4 sparsity with fine-tuning: prune a trained network before the first step, let it recover for 4 epochs.

    python -m examples.prune_finetune

The callback keeps the zeros through every optimizer step, whatever the optimizer is. State-dict keys stay what they
were, so that the result loads into the plain LightningModule.
"""

from __future__ import annotations

import lightning as L
import torch
from jsonargparse import auto_cli
from torch import nn

import lightning_obc as obc
from examples.digits import CHECKPOINT, DigitsClassifier, accuracy, quiet_trainer, trained


def zeros(model: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def main(checkpoint: str = CHECKPOINT, epochs: int = 4) -> dict[str, float]:
    """Prune, fine-tune, and compare with the dense network and with the pruned one before fine-tuning.

    Args:
        checkpoint: The trained network; it is trained first where there is none.
        epochs: Epochs of fine-tuning.
    """
    dense, data = trained(checkpoint)
    # The stem has 1 input channel, which does not divide into groups of 4.
    prune = obc.Prune("2:4", at="train_start", exclude=["stem.0"])
    figures = {"dense": accuracy(dense, data)}

    one_shot, _ = trained(checkpoint)
    obc.compress(one_shot, data.train_dataloader(), prune)
    figures["pruned"] = accuracy(one_shot, data)

    L.seed_everything(0)
    model = DigitsClassifier.load_from_checkpoint(checkpoint, lr=3e-4, decay_epochs=epochs, map_location="cpu")
    callback = obc.OBCCallback([prune], save_checkpoint=False)
    quiet_trainer(max_epochs=epochs, callbacks=[callback]).fit(model, datamodule=data)
    figures |= {"fine-tuned": accuracy(model, data), "zeros": zeros(model)}

    groups = torch.cat([layer.conv2.weight.detach().movedim(1, -1).reshape(-1, 4) for layer in model.stages])
    assert int(groups.count_nonzero(1).max()) <= 2
    print(
        f"test accuracy, {100 * figures['zeros']:.1f} % zeros (2:4): {100 * figures['fine-tuned']:.2f} % "
        f"after {epochs} epochs, {100 * figures['pruned']:.2f} % without them (dense: {100 * figures['dense']:.2f} %)"
    )
    return figures


if __name__ == "__main__":
    auto_cli(main)
