"""One-dimensional, three-dimensional and transposed convolutions, transformers' Conv1D, parametrized weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_checks import accumulated, assert_predicts_output_error, measured_hessian
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lightning_obc as obc
from lightning_obc.calibration import collect_hessians
from lightning_obc.errors import UnsupportedLayerError
from lightning_obc.layers import adapter_for, select_layers, unsupported_layers
from lightning_obc.layers.linear import LinearAdapter

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 3, "groups": 2}, (9,)),
    "conv1d same circular": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}, (6,)),
    "conv3d": (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 1)}, (3, 4, 2)),
    "conv3d depthwise": (nn.Conv3d, {"kernel_size": 2, "groups": 4}, (3, 3, 3)),
    "conv3d replicate": (nn.Conv3d, {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"}, (2, 3, 2)),
    "transposed 1d": (nn.ConvTranspose1d, {"kernel_size": 4, "stride": 2, "padding": 1, "output_padding": 1}, (5,)),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3}, (4, 3)),
    "transposed stride": (nn.ConvTranspose2d, {"kernel_size": (2, 3), "stride": (2, 3)}, (3, 4)),
    "transposed gaps": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 3, "output_padding": (2, 1)}, (3, 3)),
    "transposed padding": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": (1, 2)}, (4, 4)),
    "transposed cropped": (nn.ConvTranspose2d, {"kernel_size": 2, "padding": 2, "stride": 2}, (5, 4)),
    "transposed dilated": (nn.ConvTranspose2d, {"kernel_size": 3, "dilation": 2, "padding": 1, "groups": 2}, (4, 3)),
    "transposed depthwise": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "groups": 4, "bias": False}, (3, 3)),
    "transposed 3d": (nn.ConvTranspose3d, {"kernel_size": 2, "stride": (1, 2, 2), "padding": (0, 1, 0)}, (2, 3, 2)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(sum(map(ord, name)))
    kind, options, size = LAYERS[name]
    return kind(4, 8, **options), torch.randn(3, 4, *size)


@pytest.mark.parametrize("name", LAYERS)
def test_hessian_equals_the_jacobian_oracle(name: str) -> None:
    layer, x = make(name)
    exact = accumulated(layer.double(), x.double(), 3).finalise().full()
    torch.testing.assert_close(exact, measured_hessian(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_loss_is_the_measured_output_error(name: str) -> None:
    assert_predicts_output_error(*make(name), batch=3)


@pytest.mark.parametrize("name", LAYERS)
def test_round_trip(name: str) -> None:
    layer, x = make(name)
    adapter, before = adapter_for(layer), layer.weight.detach().clone()
    shape, matrix = adapter.shape(layer), adapter.weight_matrix(layer)
    assert tuple(matrix.shape) == (shape.groups, shape.rows, shape.columns)
    assert shape.channels * shape.positions == shape.columns
    adapter.write_weight_(layer, torch.zeros_like(matrix))
    adapter.write_weight_(layer, matrix)
    assert torch.equal(layer.weight, before)
    assert torch.equal(adapter.to_module_layout(layer, adapter.to_matrix_layout(layer, before > 0)), before > 0)
    assert torch.equal(accumulated(layer, x[0], 1).finalise().halves, accumulated(layer, x[:1], 1).finalise().halves)


@pytest.mark.parametrize("keyword", [False, True])
def test_output_size_of_a_transposed_convolution_counts(keyword: bool) -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(8, 7)) if keyword else self.up(x, [3, 3, 8, 7])

    model, x = Upsampling().double(), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    hessian = collect_hessians(model, {"up": model.up}, [x])["up"].full()
    same = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=(1, 0)).double()
    assert same(x).shape[2:] == (8, 7)
    torch.testing.assert_close(hessian, measured_hessian(same, x))


def test_the_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(5, 7)
    nn.init.normal_(layer.weight)
    assert (s := adapter_for(layer).shape(layer)).rows == 5
    assert s.columns == 7
    before = layer.weight.detach().clone()
    assert_predicts_output_error(layer, torch.randn(4, 3, 7), batch=4)
    adapter_for(layer).write_weight_(layer, adapter_for(layer).weight_matrix(layer))
    assert torch.equal(layer.weight, before)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


class NoInverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@pytest.mark.parametrize("make_layer", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(3, 4, 3)])
def test_weight_norm_can_be_compressed(make_layer: Any) -> None:
    layer = parametrizations.weight_norm(make_layer())
    keys = list(layer.state_dict())
    adapter = adapter_for(layer)
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(3, 3, 5, 5)
    assert_predicts_output_error(layer, x, batch=3)
    pruned = adapter.weight_matrix(layer)
    pruned[..., ::2] = 0
    adapter.write_weight_(layer, pruned)
    torch.testing.assert_close(adapter.weight_matrix(layer), pruned, rtol=1e-6, atol=1e-7)
    assert bool((adapter.weight_matrix(layer)[..., ::2] == 0).all())
    assert list(layer.state_dict()) == keys
    with pytest.raises(UnsupportedLayerError, match="computed by its parametrization"):
        adapter.weight(layer)


def test_a_parametrization_that_cannot_hold_the_weight_is_refused_unchanged() -> None:
    layer, adapter = nn.Linear(4, 4), LinearAdapter()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    matrix = adapter.weight_matrix(layer)
    matrix[0, 0, 3] = 0
    with pytest.raises(UnsupportedLayerError, match="Symmetric"):
        adapter.write_weight_(layer, matrix)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    symmetric = 0.5 * (matrix + matrix.mT)
    adapter.write_weight_(layer, symmetric)
    assert torch.equal(layer.weight, symmetric[0])
    # PyTorch would let the parameter live in the memory of what it was set to.
    symmetric.zero_()
    assert bool(layer.weight.any())


COMPUTED: dict[str, tuple[Any, str]] = {
    "no inverse": (lambda x: parametrize.register_parametrization(x, "weight", NoInverse()), "NoInverse has no right"),
    "symmetric": (lambda x: parametrize.register_parametrization(x, "weight", Symmetric()), "Symmetric cannot hold"),
    "spectral": (parametrizations.spectral_norm, "_SpectralNorm cannot hold"),
    "orthogonal": (parametrizations.orthogonal, "_Orthogonal cannot hold"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_parametrizations_that_cannot_hold_every_weight_are_left_dense_with_the_reason(name: str) -> None:
    register, reason = COMPUTED[name]
    model = nn.Sequential(register(nn.Linear(4, 4)), parametrizations.weight_norm(nn.Linear(4, 4)))
    before, x, state = copy.deepcopy(model.state_dict()), torch.randn(3, 4), torch.get_rng_state()
    assert list(select_layers(model)) == ["1"]
    assert reason in unsupported_layers(model)["0"]
    assert reason in str(obc.plan(model, obc.Prune(0.5), x))
    assert torch.equal(torch.get_rng_state(), state)
    # Spectral normalisation in training mode changes its buffers whenever its weight is read.
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "dim"), [(nn.Linear, 0), (nn.Linear, None), (nn.ConvTranspose1d, 0)])
def test_weight_norm_holds_slices_of_zeros(kind: Any, dim: int | None) -> None:
    """A slice without a direction would be 0 / 0."""
    layer = kind(4, 4) if kind is nn.Linear else kind(4, 4, 3)
    parametrizations.weight_norm(layer, dim=dim)
    adapter = adapter_for(layer)
    pruned = adapter.to_matrix_layout(layer, layer.weight.detach().clone().index_fill_(0, torch.tensor([1, 3]), 0))
    for matrix in (pruned, torch.zeros_like(pruned), pruned):
        adapter.write_weight_(layer, matrix)
        torch.testing.assert_close(adapter.weight_matrix(layer), matrix, rtol=1e-6, atol=0)


def test_tied_weights_are_one_problem_with_joined_statistics() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model, x = Tied().double(), torch.randn(5, 4, dtype=torch.float64)
    layers = select_layers(model)
    assert list(layers) == ["first"]
    hessian = collect_hessians(model, layers, [x])["first"]
    delta = torch.randn(1, 4, 4, dtype=torch.float64)
    changed = copy.deepcopy(model)
    adapter_for(changed.first).write_weight_(changed.first, adapter_for(model.first).weight_matrix(model.first) + delta)
    hidden = model.first(x).relu()
    errors = (changed.first(x) - model.first(x)).square().sum() + (
        changed.second(hidden) - model.second(hidden)
    ).square().sum()
    predicted = 0.5 * torch.einsum("gri,gij,grj->", delta, hessian.full(), delta)
    torch.testing.assert_close(predicted, errors.detach() / 5)
    assert hessian.samples == (3, 2)


def test_tied_weights_of_different_kinds_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 4, 1))
    model[2].weight = nn.Parameter(torch.randn(4, 4, 1))
    tied = nn.ModuleList([nn.Conv1d(4, 6, 1), nn.ConvTranspose1d(6, 4, 1)])
    tied[1].weight = tied[0].weight

    def forward(network: Any, x: Tensor) -> Tensor:
        return network[1](network[0](x))

    with pytest.raises(UnsupportedLayerError, match="shares its weight with a module of another kind"):
        collect_hessians(tied, select_layers(tied), [torch.randn(2, 4, 3)], forward=forward)
