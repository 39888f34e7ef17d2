"""A model that trains and validates, with an operator that ONNX does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.digits import DigitsClassifier


class BesselClassifier(DigitsClassifier):
    """The digits network behind a Bessel function."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` for images ``[batch, 1, 8, 8]``."""
        return torch.special.bessel_j1(super().forward(images))
