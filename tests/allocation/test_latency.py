"""Timings that users supply or that are measured."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_obc.allocation.latency import LatencyTable, measure_latency
from lightning_obc.allocation.levels import Level
from lightning_obc.errors import LayerNotReachedError, SpecError
from lightning_obc.layers import select_layers
from lightning_obc.specs import NM, IntGrid

INT8 = Level(grid=IntGrid(8), activations=8)
INT8_24 = Level(NM(2, 4), IntGrid(8), 8)


@pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf, "fast", None, True])
def test_impossible_timings_are_refused_by_name(value: Any) -> None:
    with pytest.raises(SpecError, match="conv1 at w8"):
        LatencyTable({"conv1": {"dense": 1.0, "w8": value}})
    with pytest.raises(SpecError, match="overhead"):
        LatencyTable({}, overhead=value)


def test_missing_timings_are_refused_by_name() -> None:
    table = LatencyTable({"conv1": {"dense": 1.0}})
    with pytest.raises(SpecError, match=r"conv1 at w8\+a8; conv2 at dense"):
        table.costs({"conv1": [Level(), INT8], "conv2": [Level()]})


def test_zeros_without_a_timing_run_like_the_full_layer() -> None:
    table = LatencyTable({"conv": {"dense": 4.0, "w8+a8": 2.0}}, overhead=1.0)
    costs = table.costs({"conv": [Level(), INT8, INT8_24, Level(NM(2, 4))]})
    assert costs == {"conv": {"dense": 4.0, "w8+a8": 2.0, "2:4+w8+a8": 2.0, "2:4": 4.0}}


def test_tables_come_back_from_files(tmp_path: Path) -> None:
    table = LatencyTable({"conv": {"dense": 4e-3}}, overhead=1e-3)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    (tmp_path / "broken.json").write_text('{"second": {}}')
    (tmp_path / "negative.json").write_text('{"seconds": {"conv": {"dense": -4}}}')
    for name, message in (("broken", "cannot be read"), ("none", "cannot be read"), ("negative", "conv at dense: -4")):
        with pytest.raises(SpecError, match=message):
            LatencyTable.load(tmp_path / f"{name}.json")


def test_torch_measures_the_dense_level(model: Any, batches: list[Tensor]) -> None:
    table = measure_latency(model, select_layers(model), batches[0], repeats=3, warmup=1)
    assert set(table.seconds) == {"stem", "mix", "head"}
    assert all(row["dense"] > 0 for row in table.seconds.values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(SpecError, match="runner"):
        measure_latency(model, select_layers(model), batches[0], levels=[Level(), INT8])


def test_runners_get_the_layer_its_input_and_the_level(model: Any, batches: list[Tensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}

    def runner(name: str, module: nn.Module, x: Tensor, level: Level) -> Any:
        shapes[name] = tuple(x.shape)
        return lambda: time.sleep(0.004 if level == Level() else 0.001)

    table = measure_latency(
        model, select_layers(model), batches[0], levels=[Level(), INT8], runner=runner, repeats=3, warmup=0
    )
    assert shapes == {"stem": (16, 1, 6, 6), "mix": (16, 8, 6, 6), "head": (16, 8)}
    for row in table.seconds.values():
        assert row["w8+a8"] < row["dense"]


def test_layers_without_calls_of_their_own_are_named() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    with pytest.raises(LayerNotReachedError, match="in_proj"):
        measure_latency(
            model, select_layers(model), torch.randn(1, 3, 4), forward=lambda m, x: m(x, x, x), repeats=1, warmup=0
        )
