"""What a search finds out before it solves anything: never more than the solved levels say, and mistakes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_obc.allocation import build_database
from lightning_obc.allocation.ahead import ExpectedLevels
from lightning_obc.allocation.levels import Level, product
from lightning_obc.allocation.tradeoff import search
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import BudgetError, LayerNotReachedError
from lightning_obc.layers import select_layers
from lightning_obc.specs import Block, IntGrid, Structured, Unstructured

PATTERNS = [None, Unstructured(0.3), Unstructured(0.77), "2:4", "1:4", Block(4, 0.4), Block(3, 0.3), Structured(0.4)]
GRIDS = [(None, None), (4, 8), (IntGrid(3, granularity="group", group_size=4), None)]


def awkward() -> nn.Module:
    """Three input channels, groups, and a layer whose width no block of 3 divides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 10)
    ).eval()


def compared(model: nn.Module, folder: Path) -> list[tuple[str, str, Any, Any]]:
    """Sizes beforehand and of the solved levels."""
    levels = product(PATTERNS, GRIDS)
    images = [torch.randn(64, 3, 6, 6)]
    database = build_database(folder, model, levels, lambda layers: collect_hessians(model, layers, images))
    expected, solved = ExpectedLevels(select_layers(model), levels), database.sizes()
    assert expected.layers == database.layers
    names = {name: [level.name for level in expected.levels(name)] for name in expected.layers}
    assert names == {name: [level.name for level in database.levels(name)] for name in database.layers}
    sizes = expected.sizes()
    return [(name, level, sizes[name][level], size) for name, row in solved.items() for level, size in row.items()]


def test_sizes_before_solving_are_those_of_the_solved_levels(tmp_path: Path) -> None:
    pairs = compared(awkward(), tmp_path)
    assert len(pairs) > 40
    for name, level, expected, size in pairs:
        assert (expected.weights, expected.scales) == (size.weights, size.scales), (name, level)
        assert expected.kept <= size.kept, (name, level)
        if not level.startswith(("block3", "structured")):
            # Short last blocks, and channels that are counted in every group, make these a bound only.
            assert expected.kept == size.kept, (name, level)


def test_sizes_before_solving_are_a_bound_where_zeros_are_already(tmp_path: Path) -> None:
    model = awkward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) > 0.4)
    pairs = compared(model, tmp_path)
    assert all(expected.kept <= size.kept for _, _, expected, size in pairs)
    assert any(expected.kept < size.kept for _, _, expected, size in pairs)


@pytest.mark.parametrize("cost", ["flops", "bops", "bytes"])
def test_a_budget_out_of_reach_is_refused_before_anything_is_solved(
    cost: Any, model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="at least"):
        search(model, batches, [0.5, 0.001], lambda _: 0.0, cost=cost, directory=tmp_path / "levels")
    assert not (tmp_path / "levels").exists()


def test_a_layer_that_no_batch_reaches_is_named_before_anything_is_made(tmp_path: Path) -> None:
    class Unreached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(LayerNotReachedError, match="spare"):
        search(Unreached(), torch.randn(32, 8), [0.5], lambda _: 0.0, directory=tmp_path / "levels")
    assert not (tmp_path / "levels").exists()


def test_the_look_uses_up_no_random_numbers_of_the_data() -> None:
    """Noise that a data set draws from a generator of its own is the same with and without the look."""

    class Noisy(torch.utils.data.Dataset[Tensor]):
        def __init__(self) -> None:
            self.generator, self.drawn = torch.Generator().manual_seed(0), list[float]()

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Tensor:
            x = torch.randn(8, generator=self.generator)
            self.drawn.append(float(x[0]))
            return x

    first = float(torch.randn(8, generator=torch.Generator().manual_seed(0))[0])
    data = Noisy()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(BudgetError):
        search(model, data, [1e-6], lambda _: 0.0, levels=[Level()])
    assert float(data[0][0]) == first
