"""Ranges against references computed apart, and a model that does not notice the quantizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_obc.activations import (
    ActivationGrid,
    ActivationQuantizer,
    RangeObserver,
    attach,
    attached,
    detach,
    fake_quantize,
    inputs_from_state,
    inputs_state,
    unquantized,
)
from lightning_obc.activations.ranges import MOST_VALUES
from lightning_obc.errors import (
    CalibrationError,
    EmptyCalibrationError,
    FingerprintError,
    LayerNotFoundError,
    NonFiniteError,
    SpecError,
    UnsupportedLayerError,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = torch.relu(self.norm(self.conv1(x)))
        return scale * self.head(self.conv2(y).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 2, 8, 8, generator=generator) * (1 + index) for index in range(count)]


def quantizer(net: Net, **options: Any) -> ActivationQuantizer:
    return ActivationQuantizer(net, **options).observe(batches()).freeze()


# ------------------------------------------------------------------------------------------------- ranges
def test_fake_quantization_matches_torch() -> None:
    x = torch.linspace(-3, 3, 101)
    scale, zero = torch.tensor([0.02]), torch.tensor([40.0])
    expected = torch.fake_quantize_per_tensor_affine(x, 0.02, 40, 0, 255)
    torch.testing.assert_close(fake_quantize(x, scale, zero, 255), expected, rtol=0, atol=1e-6)


def test_fake_quantization_per_channel_matches_torch() -> None:
    x = torch.randn(3, 4, 5)
    scale, zero = torch.rand(4) / 5 + 0.01, torch.tensor([0.0, 3, 7, 15])
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 1, 0, 15)
    torch.testing.assert_close(fake_quantize(x, scale, zero, 15, axis=1), expected)


def test_gradients_pass_straight_through_inside_the_range_only() -> None:
    x = torch.tensor([-5.0, -0.3, 0.2, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor([0.1]), torch.tensor([4.0]), 15).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_narrow_types_keep_their_type() -> None:
    x = torch.randn(7).to(torch.bfloat16)
    assert fake_quantize(x, torch.tensor([0.1]), torch.tensor([8.0]), 15).dtype == torch.bfloat16


def test_minmax_over_several_batches_is_exact_and_contains_zero() -> None:
    observer = RangeObserver("tensor")
    for batch in (torch.full((2, 3), 2.0), torch.tensor([[1.0, 7.0]]), torch.tensor([[3.0]])):
        observer.update(batch, -1)
    grid = observer.fit(ActivationGrid(8, range="minmax"))
    assert grid.zero_point.item() == 0
    assert grid.scale.item() == pytest.approx(7 / 255)


def test_non_negative_inputs_use_every_code() -> None:
    """A symmetric grid would waste half of them."""
    x = torch.rand(1000)
    observer = RangeObserver("tensor")
    observer.update(x[None], -1)
    errors = []
    for symmetric in (False, True):
        grid = observer.fit(ActivationGrid(4, symmetric=symmetric, range="minmax"))
        quantized = fake_quantize(x, grid.scale.flatten(), grid.zero_point.flatten(), 15)
        errors.append(float((quantized - x).square().mean()))
    assert errors[0] < 0.3 * errors[1]


def test_extremes_are_exact_however_small_the_sample() -> None:
    x = torch.zeros(1, 10 * MOST_VALUES // 16)
    x[0, 12345], x[0, 777] = 31.0, -2.0
    observer = RangeObserver("tensor", seed=3)
    for _ in range(20):
        observer.update(x, -1)
    assert sum(part.numel() for part in observer._sample) <= MOST_VALUES
    grid = observer.fit(ActivationGrid(8, range="minmax"))
    assert grid.scale.item() == pytest.approx(33 / 255)


def bulk_error(x: Tensor, spec: ActivationGrid) -> float:
    observer = RangeObserver("tensor")
    observer.update(x[None], -1)
    grid = observer.fit(spec)
    quantized = fake_quantize(x, grid.scale.flatten(), grid.zero_point.flatten(), grid.max_code)
    return float((quantized - x)[100:].square().mean())


def test_outliers_do_not_spoil_percentile_ranges() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    x[5] = 60.0
    percentile = bulk_error(x, ActivationGrid(4, range="percentile", percentile=99.9))
    assert percentile < 0.1 * bulk_error(x, ActivationGrid(4, range="minmax"))


def test_mse_ranges_clip_the_tails_of_a_normal_distribution() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert bulk_error(x, ActivationGrid(3, range="mse")) < 0.7 * bulk_error(x, ActivationGrid(3, range="minmax"))


def test_per_channel_ranges() -> None:
    x = torch.stack([torch.rand(50) * 1, torch.rand(50) * 100], 1)[:, :, None, None]
    observer = RangeObserver("channel")
    observer.update(x, -3)
    grid = observer.fit(ActivationGrid(8, granularity="channel", range="minmax"))
    torch.testing.assert_close(grid.scale.flatten(), x.amax((0, 2, 3)) / 255)


def test_nan_and_silence_are_named() -> None:
    observer = RangeObserver("tensor", name="conv7")
    with pytest.raises(CalibrationError, match="conv7"):
        observer.fit(ActivationGrid())
    observer.update(torch.tensor([[1.0, float("nan")]]), -1)
    with pytest.raises(NonFiniteError, match="conv7"):
        observer.fit(ActivationGrid())


@pytest.mark.parametrize(
    "arguments", [{"bits": 9}, {"bits": 1}, {"range": "max"}, {"granularity": "row"}, {"percentile": 40}]
)
def test_impossible_specs(arguments: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        ActivationGrid(**arguments)


# ---------------------------------------------------------------------------------------------- quantizer
def test_enabled_layers_see_quantized_inputs(net: Net) -> None:
    tool = quantizer(net, bits=4).enable()
    seen: dict[str, Tensor] = {}
    for name in ("conv1", "conv2", "head"):
        getattr(net, name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    net(batches()[0])
    for name, x in seen.items():
        grid = tool.grids[name]
        codes = x / grid.scale + grid.zero_point
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert x.unique().numel() <= 16


def test_switching_off_gives_the_model_back(net: Net) -> None:
    x = batches()[0]
    before, keys, forward = net(x), list(net.state_dict()), net.forward
    tool = quantizer(net, bits=3).enable()
    assert not torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    assert net.forward == forward
    torch.testing.assert_close(net(x, scale=2.0), 2 * net(x))
    tool.disable()
    assert torch.equal(net(x), before)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_observing_leaves_no_trace(net: Net) -> None:
    net.train()
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quantizer(net)
    assert torch.equal(torch.rand(3), expected)
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])


def test_more_bits_are_closer(net: Net) -> None:
    x = batches()[0]
    dense = net(x).detach()
    tool = quantizer(net, bits=8).enable()
    errors = []
    for bits in (8, 6, 4, 2):
        tool.set_bits(bits)
        errors.append(float((net(x).detach() - dense).norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.02 * float(dense.norm())


def test_bits_by_layer_edges_and_unknown_names(net: Net) -> None:
    tool = ActivationQuantizer(net, bits=4, edges_at_8=True)
    assert tool.bits == {"conv1": 8, "conv2": 4, "head": 8}
    tool.set_bits({"conv2": 3, "head": None})
    assert tool.bits == {"conv1": None, "conv2": 3, "head": None}
    tool.observe(batches()).freeze()
    assert list(tool.grids) == ["conv2"]
    with pytest.raises(LayerNotFoundError, match="conv9"):
        tool.set_bits({"conv9": 4})
    with pytest.raises(SpecError):
        tool.set_bits({"conv2": 12})
    assert tool.bits["conv2"] == 3


def test_per_channel_in_a_model(net: Net) -> None:
    tool = quantizer(net, spec=ActivationGrid(granularity="channel")).enable()
    assert tool.grids["conv2"].scale.shape == (1, 4, 1)
    assert tool.grids["head"].scale.shape == (1, 6, 1)
    assert net(batches()[0]).shape == (5, 3)


def test_state_comes_back_with_weights_only(net: Net, tmp_path: Any) -> None:
    tool = quantizer(net, bits={"conv1": 8, "conv2": 4}).enable()
    expected = net(batches()[0])
    torch.save(inputs_state(tool.frozen()), tmp_path / "state.pt")
    tool.disable()
    state = inputs_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    attach(net, state)
    assert {name: one.spec.bits for name, one in attached(net).items()} == {"conv1": 8, "conv2": 4}
    assert torch.equal(net(batches()[0]), expected)
    hooks = [list(module._forward_pre_hooks) for module in net.modules()]
    attach(net, state)
    assert [list(module._forward_pre_hooks) for module in net.modules()] == hooks, "nothing to attach again"
    with pytest.raises(FingerprintError, match="head9"):
        attach(net, {"head9": state["conv1"], "conv1": state["conv2"]})
    assert attached(net)["conv1"] is state["conv1"]


def test_inputs_are_taken_off_again(net: Net) -> None:
    x = batches()[0]
    before = net(x)
    attach(net, quantizer(net, bits=3).frozen())
    rounded = net(x)
    with unquantized(net) as inputs:
        assert set(inputs) == {"conv1", "conv2", "head"}
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), rounded)
    twin = copy.deepcopy(net)
    assert set(detach(twin, ["conv2"])) == {"conv2"}
    assert set(attached(twin)) == {"conv1", "head"}
    assert torch.equal(net(x), rounded), "the original keeps its hooks"
    detach(twin)
    assert torch.equal(twin(x), before)


def test_copies_and_pickles_stay_quantized(net: Net) -> None:
    x = batches()[0]
    tool = quantizer(net, bits=3).enable()
    expected = net(x)
    twin, thawed = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    tool.disable()
    assert torch.equal(twin(x), expected)
    assert torch.equal(thawed(x), expected)


def test_gradients_reach_the_first_layer(net: Net) -> None:
    quantizer(net, bits=4).enable()
    net(batches()[0]).square().sum().backward()
    gradient = net.conv1.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


def test_order_of_use_is_enforced(net: Net) -> None:
    with pytest.raises(SpecError, match="observe"):
        ActivationQuantizer(net).enable()
    with pytest.raises(CalibrationError, match="conv1"):
        ActivationQuantizer(net).freeze()
    with pytest.raises(EmptyCalibrationError):
        ActivationQuantizer(net).observe([])


def test_weights_inside_larger_modules_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(UnsupportedLayerError, match=r"1\.in_proj"):
        ActivationQuantizer(model, ["1.in_proj"])
    assert list(ActivationQuantizer(model).bits) == ["0"]
