"""Held weights on bare modules and optimizers, without a Trainer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lightning_obc as obc
from lightning_obc.callbacks.held import HeldLayer, HeldWeights
from lightning_obc.errors import FingerprintError, PatternError
from lightning_obc.grids import Grid
from lightning_obc.obs import LayerSolution


def solution(weight: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> LayerSolution:
    return LayerSolution(weight, mask, 0.0, 0.0, 1.0, grid=grid)


@pytest.fixture
def held_linear():
    """A pruned and quantized Linear with its solutions written in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    mask = torch.rand(1, 4, 8) > 0.5
    grid = Grid(obc.IntGrid(4), torch.full((1, 4, 1), 0.05), torch.full((1, 4, 1), 8.0))
    value = grid.quantize(model[0].weight.detach()[None]) * mask + 0.0
    with torch.no_grad():
        model[0].weight.copy_(value[0])
    return model, mask, grid, value


def saved_and_loaded(held: HeldWeights) -> HeldWeights:
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    twin = HeldWeights()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@pytest.mark.parametrize("after", ["freeze", "train"])
def test_state_survives_a_weights_only_file_bit_for_bit(held_linear, after):
    model, mask, grid, value = held_linear
    held = HeldWeights()
    held.hold("0", model[0], obc.Prune("2:4"), solution(value, mask))
    held.hold("0", model[0], obc.Quantize(4, after=after), solution(value, mask, grid))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
        held.apply_()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin = saved_and_loaded(held)
    layer = twin.layers["0"]
    assert torch.equal(layer.mask, mask)
    assert layer.grid.spec == grid.spec
    assert layer.pattern == obc.NM(2, 4)
    step(model, optimizer)
    held.apply_()
    expected = model[0].weight.detach().clone()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    twin.bind(model)
    step(model, optimizer)
    twin.apply_()
    assert torch.equal(model[0].weight, expected)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 16).reshape(2, 8)).square().sum().backward()
    optimizer.step()


def test_straight_through_equals_a_latent_weight_written_out(held_linear):
    """With SGD the grid point after each step is that of the latent weight minus the gradient at the grid point."""
    model, mask, grid, value = held_linear
    held = HeldWeights()
    held.hold("0", model[0], obc.Prune(0.5), solution(value, mask))
    held.hold("0", model[0], obc.Quantize(4, after="train"), solution(value, mask, grid))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    latent, moved = value.clone(), False
    for _ in range(5):
        before = model[0].weight.detach().clone()
        step(model, optimizer)
        latent = latent - 0.05 * model[0].weight.grad[None]
        held.apply_()
        expected = torch.where(mask, grid.quantize(latent), torch.zeros(()))
        torch.testing.assert_close(model[0].weight.detach()[None], expected, rtol=0, atol=1e-6)
        moved |= not torch.equal(before, model[0].weight)
    assert moved


def test_applying_twice_changes_nothing(held_linear):
    model, mask, grid, value = held_linear
    held = HeldWeights()
    held.hold("0", model[0], obc.Quantize(4, after="train"), solution(value, mask, grid))
    with torch.no_grad():
        model[0].weight.add_(0.03)
    held.apply_()
    once = model[0].weight.detach().clone()
    held.apply_()
    assert torch.equal(model[0].weight, once)
    assert not torch.equal(once, value[0])


def test_zeros_are_restored_from_nan_and_negative_zero():
    layer = nn.Linear(2, 1, bias=False)
    held = HeldWeights()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0]]))
    held.hold("fc", layer, obc.Prune(0.5), solution(layer.weight[None], torch.tensor([[[False, True]]])))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[torch.nan, -1.0]]))
    held.apply_()
    assert layer.weight.tolist() == [[0.0, -1.0]]
    assert not torch.signbit(layer.weight[0, 0])


def test_masks_only_grow():
    layer, held = nn.Linear(2, 1), HeldWeights()
    held.hold("fc", layer, obc.Prune(0.5), solution(layer.weight[None], torch.tensor([[[False, True]]])))
    with pytest.raises(PatternError, match="brings pruned weights back"):
        held.hold("fc", layer, obc.Prune(0.5), solution(layer.weight[None], torch.tensor([[[True, False]]])))


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.ReLU()), nn.Linear(8, 4)])
def test_another_model_is_refused(other):
    held = HeldWeights()
    held.layers = {"0": HeldLayer(mask=torch.ones(1, 4, 8, dtype=torch.bool))}
    with pytest.raises(FingerprintError, match="another model"):
        held.bind(other)
