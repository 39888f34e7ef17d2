"""Every tensor is made on a device that is named: a default device that holds no data finds those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc import obs
from lightning_obc.hessian import Hessian
from lightning_obc.specs import Block, IntGrid, Structured

torch.manual_seed(0)
X = torch.randn(2, 24, 80, dtype=torch.float64)
HALVES = Hessian((X @ X.mT)[:, None] / 80, samples=(80, 80))
WHOLE = HALVES.halves.mean(0)[0]
WEIGHT = torch.randn(4, 24)
SPARSE = WEIGHT * (torch.arange(24) % 5 > 0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prune(pattern: object, weight: Tensor = WEIGHT, hessian: object = WHOLE, **options: object) -> Callable[[], object]:
    return lambda: obs.prune(weight, hessian, pattern, backend="torch", **options)


def quantize(grid: object, weight: Tensor = WEIGHT, hessian: object = WHOLE, **options: object) -> Callable[[], object]:
    return lambda: obs.quantize(weight, hessian, grid, backend="torch", **options)


CASES = {
    "unstructured": prune(0.5, SPARSE),
    "sorted": prune(0.5, selection="sorted"),
    "hull": prune(0.5, selection="hull"),
    "2:4": prune("2:4", SPARSE),
    "blocks": prune(Block(4, 0.5), SPARSE),
    "structured": prune(Structured(0.5), channels=12),
    "swaps": prune(0.5, hessian=HALVES, refine=True),
    "swaps in groups": prune("2:4", hessian=HALVES, refine=True, damping="auto"),
    "every order": quantize(3),
    "one grid": quantize(IntGrid(4, granularity="tensor", scale="hessian")),
    "grids of groups": quantize(IntGrid(4, True, "group", 4, "minmax")),
    "zeros, then codes": quantize(3, SPARSE, mask=SPARSE != 0),
    "refined codes": quantize(3, hessian=HALVES, refine=True, damping="auto"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_pattern(name: str) -> None:
    with torch.device("meta"):
        CASES[name]()


class Net(nn.Module):
    """A layer of most kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.linear, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last, self.lstm = nn.LayerNorm(8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.norm(self.conv(x)).relu()))
        x = self.linear(x.flatten(2).mT[:, :6])
        x = x + self.attention(x, x, x)[0]
        return self.lstm(self.last(x))[0]


@pytest.mark.parametrize("mode", ["independent", "asymmetric"])
def test_calibration_of_every_kind_of_layer(mode: str) -> None:
    model, batches = Net().eval(), [torch.randn(2, 4, 6, 6) for _ in range(2)]
    stages = [obc.Prune(0.5, backend="torch"), obc.Quantize(4, backend="torch", activations=8)]
    positions = 9 if mode == "independent" else None
    with torch.device("meta"):
        obc.compress(model, batches, stages, calibration=obc.Calibration(mode=mode, positions=positions))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
