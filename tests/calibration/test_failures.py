"""What users read when a batch does not fit the model, or when there is none: the layer, the shapes, the loader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_obc as obc
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import CalibrationError, EmptyCalibrationError, ShapeError
from lightning_obc.layers import select_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.enc(x)


class Lengths(Net):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return self.enc(x) * lengths[:, None]


class Whole(Net):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.enc(batch["x"])


class Packed(Net):
    def forward(self, *inputs: Any) -> Tensor:  # type: ignore[override]
        return self.enc(inputs[1])


class Step(Net):
    def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.enc(batch["inputs"])


X = torch.randn(6, 8)


@pytest.mark.parametrize(
    ("model", "batch", "told"),
    [
        (Lengths(), (X, torch.ones(6)), ("'lengths'", "its first element, [6, 8] float32", "[6] float32")),
        (Whole(), {"x": X}, ("'batch'", "entries of no known name", "dict('x': [6, 8] float32)")),
        (Packed(), X, ("IndexError", "the model itself (Packed), which gets [6, 8] float32", "in forward")),
        (Step(), {"x": X}, ("KeyError: 'inputs'", "calibration_step", "calibration_dataloader()")),
        (Net(), X.double(), ("layer 'enc.0' (Linear), which gets [6, 8] float64", "same dtype")),
    ],
)
def test_what_fails_in_a_forward_pass_is_said(model: nn.Module, batch: Any, told: tuple[str, ...]) -> None:
    with pytest.raises(CalibrationError, match="cannot be sent through the model") as caught:
        obc.compress(model, [batch], obc.Quantize(4))
    assert [part for part in told if part not in str(caught.value)] == []
    assert caught.value.__cause__ is not None


def test_an_own_forward_that_fails_is_named_too() -> None:
    with pytest.raises(
        CalibrationError, match=r"AttributeError.*test_failures.py:\d+ in .*forward= got model and batch"
    ):
        obc.compress(Net(), [X], obc.Quantize(4), forward=lambda model, batch: model(batch.inputs))


@pytest.mark.parametrize(
    ("x", "shapes"),
    [
        (torch.randn(6, 2, 8, 8), r"'0' \(Conv2d\).*\[6, 2, 8, 8\] float32, weight \[4, 3, 3, 3\]"),
        (torch.randn(6, 3, 4, 4), r"'1' \(Conv2d\).*\[6, 4, 2, 2\] float32, weight \[4, 4, 3, 3\]"),
    ],
)
def test_inputs_of_a_wrong_shape_name_their_layer(x: Tensor, shapes: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ShapeError, match=shapes):
        collect_hessians(model, select_layers(model), [x])


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (DataLoader(TensorDataset(X[:0]), batch_size=4), r"DataLoader of 0 batches over TensorDataset of 0 samples"),
        (DataLoader(Stream(), batch_size=4), "DataLoader of an unknown number of batches over Stream of an unknown"),
        ([], "list of 0 batches"),
    ],
)
def test_empty_calibration_data_says_what_it_is(batches: Any, told: str) -> None:
    for stages in (obc.Quantize(4), [obc.Quantize(4), obc.Correct("bias")]):
        with pytest.raises(EmptyCalibrationError, match=told):
            obc.compress(Net(), batches, stages)
