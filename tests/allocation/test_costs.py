"""Costs by their conventions, and the positions counted by hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_obc.allocation.costs import LevelSize, bops, cost_table, count_positions, flops, level_cost, stored_bytes
from lightning_obc.allocation.levels import Level
from lightning_obc.errors import LayerNotReachedError, SpecError
from lightning_obc.layers import select_layers
from lightning_obc.metrics.storage import Storage
from lightning_obc.specs import NM, Block, IntGrid, Unstructured

W8A8_24 = Level(NM(2, 4), IntGrid(8), 8)


def test_dense_float_is_the_baseline() -> None:
    dense = LevelSize.dense(100)
    assert flops(dense, 7) == 700
    assert bops(dense, 7) == 700 * 32 * 32
    assert stored_bytes(dense) == 400


def test_bops_multiply_both_widths_and_what_is_kept() -> None:
    size = LevelSize(W8A8_24, weights=100, kept=50, scales=4)
    assert bops(size, 3) == 3 * 50 * 8 * 8
    assert bops(size, 3, mask_cost=True) == 3 * 50 * 8 * 8 + 3 * 100
    # Weights alone: the multiplications still have 32-bit inputs.
    assert bops(LevelSize(Level(grid=IntGrid(4)), 100, 100, 4), 1, mask_cost=True) == 100 * 4 * 32


@pytest.mark.parametrize(
    "level", [Level(), Level(NM(2, 4)), W8A8_24, Level(Unstructured(0.75)), Level(Block(4, 0.75), IntGrid(4))]
)
def test_bytes_follow_the_convention_of_the_metrics(level: Level) -> None:
    weight = torch.ones(8, 32)
    if level.pattern is not None:
        blocks = weight.view(8, 8, 4)
        if isinstance(level.pattern, NM):
            blocks[..., 2:] = 0
        else:
            blocks[:, :6] = 0
    scales = 0 if level.grid is None else 8
    size = LevelSize(level, weight.numel(), int((weight != 0).sum()), scales)
    assert stored_bytes(size) == Storage(level.weight_bits, level.pattern, scales).size(weight)


def test_unknown_costs_are_refused() -> None:
    with pytest.raises(SpecError, match="Unknown cost"):
        level_cost("energy", LevelSize.dense(1), 1)  # type: ignore[arg-type]


def test_table_covers_every_level() -> None:
    sizes = {"a": {"dense": LevelSize.dense(10), "0.5": LevelSize(Level(Unstructured(0.5)), 10, 5)}}
    assert cost_table("flops", sizes, {"a": 4.0}) == {"a": {"dense": 40.0, "0.5": 20.0}}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 2, 2, stride=2)
        self.tokens = nn.Linear(2, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.conv(x)).flatten(2).transpose(1, 2)
        z = self.tokens(y)
        return self.attention(z, z, z)[0]


def test_positions_are_counted_per_sample() -> None:
    model = Mixed()
    layers = select_layers(model, exclude=["unused"])
    counted = count_positions(model, layers, torch.randn(5, 4, 8, 8))
    assert counted == {
        "conv": 16.0,
        "up": 16.0,
        "tokens": 64.0,
        "attention.in_proj": 64.0,
        "attention.out_proj": 64.0,
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flops_of_a_convolution_match_the_multiplications_by_hand() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    positions = count_positions(conv, {"conv": conv}, torch.randn(1, 4, 5, 6), forward=lambda m, b: m(b))["conv"]
    by_hand = 8 * 5 * 6 * (4 // 2) * 3 * 3
    assert flops(LevelSize.dense(conv.weight.numel()), positions) == by_hand


def test_layers_that_are_not_reached_are_named() -> None:
    model = Mixed()
    with pytest.raises(LayerNotReachedError, match="unused"):
        count_positions(model, select_layers(model), torch.randn(1, 4, 8, 8))
