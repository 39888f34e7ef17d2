"""Statistics before and behind compressed layers, against the inputs themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_obc.calibration import Collector, DenseWeights, collect_hessians, collect_paired
from lightning_obc.errors import CalibrationError, LayerNotReachedError, ShapeError, UnsupportedLayerError
from lightning_obc.kernels.hessian_update.naive import naive_unfold
from lightning_obc.layers import adapter_for, register_adapter, select_layers
from lightning_obc.layers.base import LayerAdapter
from lightning_obc.layers.conv import conv_geometry
from lightning_obc.layers.linear import LinearAdapter
from lightning_obc.specs import Calibration


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 12, 3, stride=2, groups=3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.recurrent = nn.GRU(12, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x).relu_())
        x = self.up(x).flatten(2).mT
        x = self.attention(x, x, x)[0]
        return self.head(self.recurrent(x)[0][:, -1])


ORDER = ["stem", "grouped", "up", "attention.in_proj", "attention.out_proj"]
ORDER += ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "head"]


def networks() -> tuple[Network, Network, list[Tensor]]:
    torch.manual_seed(0)
    before = Network()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.stem.weight += 0.1 * torch.randn_like(after.stem.weight)
    return before, after, [torch.randn(n, 3, 6, 6) for n in (3, 2)]


def dense_of(before: Network, after: Network) -> DenseWeights:
    """The weights of ``before`` in terms of ``after``."""
    dense, changed = DenseWeights(), after.stem.weight.detach().clone()
    with torch.no_grad():
        after.stem.weight.copy_(before.stem.weight)
    dense.keep(after.stem)
    with torch.no_grad():
        after.stem.weight.copy_(changed)
    return dense


def recorded(model: Network, name: str, batches: list[Tensor]) -> Tensor:
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen)


def test_cross_products_are_those_of_the_unfolded_inputs() -> None:
    before, after, batches = networks()
    found = collect_paired(after, select_layers(after), batches, dense_of(before, after))
    for name in ("grouped", "up", "head"):
        x, y = recorded(before, name, batches), recorded(after, name, batches)
        layer = after.get_submodule(name)
        if name == "grouped":
            x, y = (naive_unfold(z, conv_geometry(layer)) for z in (x, y))
        elif name == "head":
            x, y = x.double().unsqueeze(1), y.double().unsqueeze(1)
        else:  # stride equals kernel size: every output position sees one input position, through one kernel position
            continue
        cross = 2 / 5 * torch.einsum("ngi,ngj->gij", x - y, y)
        difference = 2 / 5 * torch.einsum("ngi,ngj->gij", x - y, x - y)
        torch.testing.assert_close(found[name].cross, cross, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].difference, difference, rtol=1e-5, atol=1e-6)


def test_what_was_seen_before_comes_back_for_every_adapter() -> None:
    """``X Xᵀ = X'X'ᵀ + D + Dᵀ + (X - X')(X - X')ᵀ``, with the left side collected on the model before."""
    before, after, batches = networks()
    layers, state = select_layers(after), copy.deepcopy(after.state_dict())
    found = collect_paired(after, layers, batches, dense_of(before, after))
    assert all(torch.equal(value, state[key]) for key, value in after.state_dict().items())
    dense = collect_hessians(before, select_layers(before), batches)
    own = collect_hessians(after, layers, batches)
    for name, statistic in found.items():
        assert torch.equal(statistic.hessian.halves, own[name].halves), name
        scale = float(dense[name].full().amax())
        torch.testing.assert_close(statistic.before(), dense[name].full(), rtol=1e-5, atol=1e-6 * scale)
        # The symmetric part alone would hide a transposed product.
        if name != "stem":
            assert not torch.allclose(statistic.cross, statistic.cross.mT)


def test_nothing_changed_is_exactly_zero() -> None:
    _, model, batches = networks()
    for statistic in collect_paired(model, select_layers(model), batches, DenseWeights()).values():
        assert not statistic.cross.any()
        assert not statistic.difference.any()


def test_layers_come_in_the_order_of_the_forward_pass() -> None:
    _, model, batches = networks()
    layers = select_layers(model)
    assert next(iter(layers)) == "head"
    assert Collector(model, batches, Calibration()).order(layers) == ORDER


def test_both_passes_draw_the_same_random_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + torch.randn_like(x))

    model = Noisy()
    found = collect_paired(model, {"head": model.head}, [torch.zeros(3, 4)], DenseWeights())
    assert found["head"].hessian.halves.any()
    assert not found["head"].difference.any()


def test_inputs_that_cannot_be_compared_are_refused() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Linear(4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[self.score(x)[:, 0] > 0])

    torch.manual_seed(0)
    model, x = Choosing(), torch.randn(16, 4)
    dense = DenseWeights()
    dense.keep(model.score)
    with torch.no_grad():
        model.score.weight.neg_()
    with pytest.raises(ShapeError, match="'head'"):
        collect_paired(model, {"head": model.head}, [x], dense)

    class Sometimes(Choosing):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if self.score(x).sum() > 0 else x

    other = Sometimes()
    other.load_state_dict(model.state_dict())
    dense = DenseWeights()
    dense.keep(other.score)
    with torch.no_grad():
        other.score.bias.copy_(torch.tensor([100.0]))
    with pytest.raises(LayerNotReachedError, match="'head'"):
        collect_paired(other, {"head": other.head}, [x - 100 * other.score.weight.detach()], dense)


def test_an_adapter_without_cross_products_is_refused_by_name() -> None:
    class Plain(LinearAdapter):
        accumulate_cross_ = LayerAdapter.accumulate_cross_

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    register_adapter(Odd, Plain())
    import lightning_obc as obc

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    state = copy.deepcopy(model.state_dict())
    assert adapter_for(model[1]) is not None
    with pytest.raises(UnsupportedLayerError, match="Plain without accumulate_cross_"):
        obc.compress(model, torch.randn(8, 4), obc.Quantize(4), calibration=Calibration(mode="sequential"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_iterator_cannot_serve_several_passes() -> None:
    model = nn.Linear(4, 2)
    collect = Collector(model, iter([torch.randn(3, 4)]), Calibration())
    collect({"": model})
    with pytest.raises(CalibrationError, match="only once"):
        collect({"": model})
