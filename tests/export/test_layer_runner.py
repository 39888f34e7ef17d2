"""Layers timed in ONNX Runtime compute what they are timed for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_obc.allocation.latency import LatencyTable, measure_latency
from lightning_obc.allocation.levels import Level
from lightning_obc.errors import ExportError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.layers import adapter_for, select_layers
from lightning_obc.specs import NM, IntGrid

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
INT8 = Level(grid=IntGrid(8), activations=8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(1))


def test_every_level_of_every_layer_is_timed(net: Net, images: Tensor) -> None:
    from lightning_obc.export import layer_runner

    before = copy.deepcopy(net.state_dict())
    levels = [Level(), INT8, Level(NM(2, 4), IntGrid(8), 8)]
    table = measure_latency(net, select_layers(net), images, levels=levels, runner=layer_runner(), repeats=3, warmup=1)
    assert set(table.seconds) == {"conv", "head"}
    assert all(set(row) == {"dense", "w8+a8", "2:4+w8+a8"} for row in table.seconds.values())
    assert all(0 < seconds < 1 for row in table.seconds.values() for seconds in row.values())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    costs = LatencyTable(table.seconds).costs({"conv": levels, "head": levels})
    assert costs["conv"]["w8+a8"] == table.seconds["conv"]["w8+a8"]


def test_the_rest_of_the_network_is_overhead(net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_obc.export import model_runner

    logits = model_runner(net, (images,))()[0]
    assert logits.shape == (3, 6)
    assert model_runner(net, {"x": images})()[0].shape == (3, 6)
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    how: dict[str, Any] = {"runner": lambda *_: lambda: None, "repeats": 3}

    def slow() -> None:
        for _ in range(9):
            next(clock)

    assert measure_latency(net, select_layers(net), images, whole=slow, **how).overhead == 10 - 2
    assert measure_latency(net, select_layers(net), images, **how).overhead == 0.0


def test_the_floating_point_layer_computes_the_layer(net: Net, images: Tensor) -> None:
    from lightning_obc.export import layer_runner

    (out,) = layer_runner()("conv", net.conv, images, Level())()
    np.testing.assert_allclose(out, net.conv(images).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_the_integer_layer_takes_and_gives_codes(net: Net, images: Tensor) -> None:
    """Against the quantized weight by hand: the same codes, but for roundings at a boundary."""
    from lightning_obc.export import layer_runner
    from lightning_obc.export.ranges import ActivationRange

    (codes,) = layer_runner()("conv", net.conv, images, INT8)()
    assert codes.dtype == np.uint8
    layer, adapter = copy.deepcopy(net.conv), adapter_for(net.conv)
    assert adapter is not None
    weight = adapter.weight_matrix(layer)
    adapter.write_weight_(layer, fit_grid(weight, IntGrid(7, symmetric=True), channels=4).quantize(weight))
    limits = ActivationRange.between(float(images.min()), float(images.max()))
    rounded = (torch.round(images / limits.scale)).clamp(-limits.zero_point, 255 - limits.zero_point) * limits.scale
    with torch.no_grad():
        exact, y = layer(images), layer(rounded)
    out = ActivationRange.between(float(exact.min()), float(exact.max()))
    expected = (torch.round(y / out.scale) + out.zero_point).clamp(0, 255)
    difference = np.abs(codes.astype(int) - expected.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.9


@pytest.mark.parametrize("linear", ["packed", "packed-int8"])
def test_linear_layers_run_from_packed_codes_where_weights_alone_are_quantized(linear: Any) -> None:
    from lightning_obc.export import layer_runner
    from lightning_obc.export.packed_linear import rounded_inputs

    torch.manual_seed(0)
    layer, x, runner = nn.Linear(64, 6), torch.randn(3, 5, 64), layer_runner(linear=linear)
    grids = [IntGrid(4), IntGrid(3, granularity="group", group_size=32), IntGrid(8)]
    runs = [runner("layer", layer, x, Level(grid=grid)) for grid in grids]
    for grid, run in zip(grids, runs, strict=True):
        adapter = adapter_for(layer)
        assert adapter is not None
        weight = fit_grid(adapter.weight_matrix(layer), grid, channels=64).quantize(adapter.weight_matrix(layer))
        # Eight bits beside inputs in floating point are not packed.
        block = 32 if grid.group_size else 64
        inputs = rounded_inputs(x, block) if linear == "packed-int8" else x
        expected = nn.functional.linear(inputs, weight[0], layer.bias)
        np.testing.assert_allclose(run()[0], expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    (dense,) = runner("layer", layer, x, Level())()
    np.testing.assert_allclose(dense, layer(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    (codes,) = runner("layer", layer, x, INT8)()
    assert codes.dtype == np.uint8


def test_a_grid_that_a_layer_cannot_have_does_not_end_the_timing() -> None:
    """A search leaves the level out for this layer alone; its times are asked for all the same."""
    from lightning_obc.export import layer_runner

    layer, x, level = nn.Linear(100, 6), torch.randn(3, 100), Level(grid=IntGrid(4, granularity="group", group_size=32))
    (found,) = layer_runner(linear="packed")("layer", layer, x, level)()
    np.testing.assert_allclose(found, layer(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_an_unknown_kind_of_linear_layers_is_refused() -> None:
    from lightning_obc.export import layer_runner

    with pytest.raises(ExportError, match="Unknown kind of linear layers"):
        layer_runner(linear="fast")  # type: ignore[arg-type]


def test_a_layer_that_cannot_be_exported_is_named(images: Tensor) -> None:
    from lightning_obc.export import layer_runner

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    module: Any = Odd(4, 4)
    with pytest.raises(ExportError, match=r"Layer 'odd' cannot be timed"):
        layer_runner()("odd", module, torch.ones(2, 4), Level())
