"""OBC beside the simplest methods: 2:4 and 4 bits on the same trained digits network, without any retraining.

    python -m examples.digits_baselines

The error of a layer is the squared difference of its outputs, per image, when both networks' layers see the inputs
that the dense network gives them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn

import lightning_obc as obc
from examples.digits import DigitsClassifier, DigitsData
from lightning_obc.report import render

EXCLUDE = ["stem.0"]  # 1 input channel: 2:4 does not fit there
OURS = [obc.Prune("2:4", exclude=EXCLUDE), obc.Quantize(4)]
SIMPLE = [obc.Prune("2:4", exclude=EXCLUDE, solver="magnitude"), obc.Quantize(4, solver="rtn")]


def layer_errors(dense: nn.Module, compressed: nn.Module, images: Tensor) -> dict[str, float]:
    """Squared output error per image of every convolution and linear layer, on the dense network's inputs."""
    errors: dict[str, float] = {}

    def compare(name: str, twin: nn.Module):
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            errors[name] = float((twin(*inputs) - output).square().sum() / len(images))

        return hook

    layers = [(name, layer) for name, layer in dense.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(compare(name, compressed.get_submodule(name))) for name, layer in layers]
    with torch.no_grad():
        dense.eval()(images)
    for handle in handles:
        handle.remove()
    return errors


def accuracy(model: nn.Module, data: DigitsData) -> float:
    """Accuracy on the validation images."""
    with torch.no_grad():
        images, labels = next(iter(data.val_dataloader()))
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def compress(dense: nn.Module, data: DigitsData, stages: Sequence[obc.Prune | obc.Quantize]) -> nn.Module:
    """A compressed copy of a trained network."""
    model = copy.deepcopy(dense)
    obc.compress(model, data.train_dataloader(), stages)
    return model


def main() -> dict[str, dict[str, float]]:
    """Train, compress both ways, print the table; returns the layer errors of both."""
    L.seed_everything(0)
    dense, data = DigitsClassifier(), DigitsData()
    trainer = L.Trainer(
        max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(dense, data)
    networks = {"OBC": compress(dense, data, OURS), "magnitude + nearest": compress(dense, data, SIMPLE)}
    images = torch.cat([images for images, _ in data.train_dataloader()])
    errors = {name: layer_errors(dense, network, images) for name, network in networks.items()}
    rows = [[layer, *(f"{errors[name][layer]:.4g}" for name in networks)] for layer in errors["OBC"]]
    rows.append(["sum", *(f"{sum(errors[name].values()):.4g}" for name in networks)])
    print(render("Squared output error per image", ("layer", *networks), rows))
    figures = ", ".join(f"{name} {accuracy(network, data):.4f}" for name, network in networks.items())
    print(f"validation accuracy: dense {accuracy(dense, data):.4f}, {figures}")
    return errors


if __name__ == "__main__":
    main()
