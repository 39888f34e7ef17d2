"""Calibration behind compressed layers on a trained network, by the error of its outputs on unseen images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A digits network after three epochs, training images, and images that it has not seen."""
    import lightning as L

    from examples.digits import DigitsClassifier, DigitsData

    L.seed_everything(0, workers=True)
    data, model = DigitsData(), DigitsClassifier()
    silent: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    L.Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **silent).fit(model, data)
    seen, unseen = (torch.stack([image for image, _ in part]) for part in (data.train, data.val))
    return model.eval(), seen[:384], unseen


@pytest.mark.slow
@pytest.mark.parametrize("stage", [obc.Quantize(3), obc.Prune(0.8)], ids=str)
def test_asymmetric_calibration_more_than_halves_the_error_of_unseen_outputs(trained: Any, stage: Any) -> None:
    dense, seen, unseen = trained
    errors = {}
    for name, options in (
        ("independent", {}),
        ("layer", {"mode": "asymmetric"}),
        ("block", {"mode": "asymmetric", "together": "block", "cache": "100 MiB"}),
    ):
        model = copy.deepcopy(dense)
        spec = obc.Calibration(batch_size=128, **options)
        obc.compress(model, seen, stage, calibration=spec, on_failure="raise")
        with torch.no_grad():
            errors[name] = float((model(unseen) - dense(unseen)).square().sum())
    assert errors["layer"] < 0.5 * errors["independent"]
    assert errors["block"] < 0.6 * errors["independent"]
