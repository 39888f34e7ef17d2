"""A small trained-looking network, its data and a database that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_obc.allocation.build import build_database
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level, product
from lightning_obc.calibration import collect_hessians
from lightning_obc.hessian import Hessian


class Tiny(nn.Module):
    """A stem that 2:4 does not fit, a grouped convolution, batch-norm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.mix(y)).mean((2, 3)))


LEVELS = product([None, "2:4", 0.5, 0.75], [(None, None), (8, 8), (4, 4)])


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="session")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 6, 6, generator=generator) for _ in range(3)]


@pytest.fixture
def statistics(model: Tiny, batches: list[Tensor]) -> Callable[..., dict[str, Hessian]]:
    """Collects the Hessians of the layers it is given, and counts how often it was called."""

    def collect(layers: dict[str, nn.Module]) -> dict[str, Hessian]:
        collect.calls.append(list(layers))  # type: ignore[attr-defined]
        return collect_hessians(model, layers, batches)

    collect.calls = []  # type: ignore[attr-defined]
    return collect


@pytest.fixture
def database(model: Tiny, statistics: Callable[..., dict[str, Hessian]], tmp_path: Path) -> Database:
    levels: list[Level] = LEVELS
    return build_database(tmp_path / "db", model, levels, statistics)
