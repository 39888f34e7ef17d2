"""Small models with compressed weights, made without the engine: export cares what the weights are, not how."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_obc.export import CompressedWeight
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.layers import adapter_for, select_layers
from lightning_obc.specs import IntGrid


class ResidualNet(nn.Module):
    """Convolutions with batch-norm around a shortcut, pooling and a linear head, for images ``[batch, 1, 8, 8]``."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm0(self.stem(images))), 2)
        y = F.relu_(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.head(F.relu(y).mean((2, 3)))


def residual_net(seed: int = 0, width: int = 8) -> ResidualNet:
    """A network whose batch-norms are not the identity, some with negative factors."""
    torch.manual_seed(seed)
    net = ResidualNet(width)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            with torch.no_grad():
                module.weight[0] *= -1
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def random_mask(weight: Tensor, pattern: str | float, seed: int = 0) -> Tensor:
    """A mask of ``[g, R, d]``, ``"n:m"`` along the columns or random with a share of zeros."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(weight.shape, generator=generator)
    if isinstance(pattern, str):
        kept, size = map(int, pattern.split(":"))
        if weight.shape[-1] % size:
            return torch.ones_like(weight, dtype=torch.bool)
        ranks = scores.reshape(-1, size).argsort(-1).argsort(-1)
        return (ranks < kept).reshape(weight.shape)
    return scores >= pattern


def compress_(
    model: nn.Module, grid: IntGrid | None = None, pattern: str | float | None = None, layers: list[str] | None = None
) -> dict[str, CompressedWeight]:
    """Prune at random and round to nearest, in place; returns what was done."""
    state = {}
    for index, (name, module) in enumerate(select_layers(model, layers).items()):
        adapter = adapter_for(module)
        assert adapter is not None
        weight = adapter.weight_matrix(module)
        mask = torch.ones_like(weight, dtype=torch.bool) if pattern is None else random_mask(weight, pattern, index)
        weight = weight * mask + 0.0
        fitted = None
        if grid is not None:
            channels = adapter.shape(module).channels
            spec = grid if grid.group_size is None or channels % grid.group_size == 0 else IntGrid(grid.bits)
            fitted = fit_grid(weight, spec, channels=channels)
            weight = fitted.quantize(weight)
        adapter.write_weight_(module, weight)
        state[name] = CompressedWeight.from_weight(weight, mask, fitted)
    return state
