"""What must not change a compressed network: samples given twice, other batches, and the other layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc

Result = tuple[dict[str, Tensor], obc.CompressionReport]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(72, 12)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def compressed(network: nn.Module, batches: list[Tensor]) -> Result:
    model = copy.deepcopy(network)
    report = obc.compress(model, batches, [obc.Prune("2:4"), obc.Quantize(4)], on_failure="raise")
    return {name: value.clone() for name, value in model.state_dict().items()}, report


def assert_same_network(got: Result, expected: Result) -> None:
    for name, value in expected[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=1e-5, atol=1e-7)
        assert torch.equal(got[0][name] == 0, value == 0)
    for one, other in zip(got[1].stages, expected[1].stages, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_samples_given_twice_change_nothing(network: nn.Module, images: Tensor) -> None:
    batches = list(images.split(16))
    once, twice = compressed(network, batches), compressed(network, batches + batches)
    assert_same_network(twice, once)
    assert [stage.samples for stage in twice[1].stages] == [96, 96]


def test_batches_of_another_size_and_order_change_nothing(network: nn.Module, images: Tensor) -> None:
    expected = compressed(network, list(images.split(16)))
    assert_same_network(compressed(network, list(images.flip(0).split(7))), expected)


def test_the_same_batches_give_the_same_bits(network: nn.Module, images: Tensor) -> None:
    batches = list(images.split(16))
    first, second = compressed(network, batches), compressed(network, batches)
    assert all(torch.equal(first[0][name], value) for name, value in second[0].items())
    assert [stage.loss for stage in first[1].stages] == [stage.loss for stage in second[1].stages]


@pytest.mark.parametrize("name", ["0", "3", "6"])
def test_a_layer_alone_is_the_layer_among_others(name: str, network: nn.Module, images: Tensor) -> None:
    """Calibration is independent by default: no layer sees what became of another one, within a stage."""
    batches = list(images.split(16))
    together = obc.compress(copy.deepcopy(network), batches, obc.Prune("2:4"))
    alone = obc.compress(copy.deepcopy(network), batches, obc.Prune("2:4", layers=[name]))
    assert torch.equal(alone.solutions[name].weight, together.solutions[name].weight)
    assert alone.solutions[name].loss == together.solutions[name].loss


def test_a_reported_loss_is_the_squared_error_of_the_outputs(network: nn.Module, images: Tensor) -> None:
    """Computed anew from the weights in float64, by the layers themselves."""
    model = copy.deepcopy(network)
    inputs: dict[str, Tensor] = {}
    seen = copy.deepcopy(network)
    for name in ("0", "3", "6"):
        seen.get_submodule(name).register_forward_hook(lambda _, x, __, name=name: inputs.update({name: x[0]}))
    seen(images)
    report = obc.compress(model, list(images.split(16)), obc.Prune("2:4"), on_failure="raise")
    for row in report.stages[0].layers:
        dense, pruned = (copy.deepcopy(part.get_submodule(row.name)).double() for part in (network, model))
        with torch.no_grad():
            x = inputs[row.name].double()
            error = (pruned(x) - dense(x)).square().sum() / len(images)
            whole = (dense(x) - (0 if dense.bias is None else dense(torch.zeros_like(x)))).square().sum() / len(images)
        assert row.loss == pytest.approx(float(error), rel=1e-5)
        assert row.relative_error == pytest.approx(float(error / whole), rel=1e-5)
        assert row.sparsity == pytest.approx(float((model.get_submodule(row.name).weight == 0).double().mean()))
