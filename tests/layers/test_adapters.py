"""Adapters against an oracle that autograd builds: the Jacobian of a layer's output in its weight holds exactly X."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_checks import accumulated, assert_predicts_output_error, measured_hessian, measured_hessian_linear
from torch import Tensor, nn

from lightning_obc.errors import ShapeError
from lightning_obc.layers import adapter_for

CONVS = {
    "plain": ({"kernel_size": 3}, (5, 6)),
    "1x1": ({"kernel_size": 1}, (4, 3)),
    "stride": ({"kernel_size": 3, "stride": 2, "padding": 1}, (7, 6)),
    "stride gaps": ({"kernel_size": 2, "stride": 3}, (8, 7)),
    "stride pair": ({"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}, (5, 6)),
    "dilation": ({"kernel_size": 3, "dilation": 2, "padding": 2}, (6, 7)),
    "dilation pair": ({"kernel_size": (2, 3), "dilation": (3, 1), "stride": (2, 1), "padding": (1, 2)}, (7, 5)),
    "same": ({"kernel_size": 3, "padding": "same"}, (5, 4)),
    "same even": ({"kernel_size": (2, 4), "padding": "same"}, (5, 6)),
    "same even dilated": ({"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)}, (6, 6)),
    "valid": ({"kernel_size": 2, "padding": "valid"}, (4, 4)),
    "groups": ({"kernel_size": 3, "padding": 1, "groups": 2}, (5, 5)),
    "depthwise": ({"kernel_size": 3, "padding": 1, "groups": 4}, (5, 5)),
    "depthwise 1x1": ({"kernel_size": 1, "groups": 4}, (4, 4)),
    "groups stride dilation": ({"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 3, "groups": 2}, (8, 7)),
    "no bias": ({"kernel_size": 3, "bias": False}, (4, 5)),
    "reflect": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 4)),
    "reflect same even": ({"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}, (6, 5)),
    "replicate": ({"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate", "stride": 2}, (5, 6)),
    "circular": ({"kernel_size": 3, "padding": 1, "padding_mode": "circular", "dilation": 1}, (5, 4)),
    "circular groups": ({"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular", "groups": 2}, (4, 5)),
    "valid with a mode": ({"kernel_size": 3, "padding": "valid", "padding_mode": "reflect"}, (5, 5)),
}


def make_conv(name: str) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(sum(map(ord, name)))
    options, size = CONVS[name]
    return nn.Conv2d(4, 6 if options.get("groups", 1) != 4 else 8, **options), torch.randn(3, 4, *size)


@pytest.mark.parametrize("name", CONVS)
def test_conv_hessian_equals_the_jacobian_oracle(name: str) -> None:
    layer, x = make_conv(name)
    expected = measured_hessian(layer, x)
    # The rounding of a float32 product is relative to the diagonal, not to entries that cancel.
    rounding = 1e-6 * expected.amax().item()
    torch.testing.assert_close(accumulated(layer, x, 3).finalise().full(), expected, rtol=1e-6, atol=rounding)
    exact = accumulated(layer.double(), x.double(), 3).finalise().full()
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVS)
def test_conv_loss_is_the_measured_output_error(name: str) -> None:
    assert_predicts_output_error(*make_conv(name), batch=3)


@pytest.mark.parametrize("leading", [(), (4,), (4, 3), (4, 2, 3)])
def test_linear_loss_is_the_measured_output_error(leading: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(7, 5), torch.randn(*leading, 7)
    assert_predicts_output_error(layer, x, batch=leading[0] if leading else 1)
    n = leading[0] if leading else 1
    torch.testing.assert_close(
        accumulated(layer.double(), x.double(), n).finalise().full(), measured_hessian_linear(x, n)
    )


def test_unbatched_conv_input_is_one_sample() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(3, 6, 6)
    torch.testing.assert_close(
        accumulated(layer, x, 1).finalise().full(), accumulated(layer, x.unsqueeze(0), 1).finalise().full()
    )


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (nn.Linear(5, 3), (1, 3, 5), 5),
        (nn.Conv2d(6, 4, (3, 2)), (1, 4, 36), 6),
        (nn.Conv2d(6, 4, 3, groups=2), (2, 2, 27), 3),
        (nn.Conv2d(6, 12, 3, groups=6), (6, 2, 9), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_make_the_round_trip_bit_for_bit(
    layer: nn.Module, shape: tuple[int, int, int], channels: int, dtype: torch.dtype
) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    adapter = adapter_for(layer)
    matrix = adapter.weight_matrix(layer)
    assert tuple(matrix.shape) == shape
    assert (adapter.shape(layer).groups, adapter.shape(layer).rows, adapter.shape(layer).columns) == shape
    assert adapter.shape(layer).channels == channels
    parameter, before = layer.weight, layer.weight.detach().clone()
    matrix_copy = matrix.clone()
    matrix.zero_()
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.weight.fill_(7)
    adapter.write_weight_(layer, matrix_copy)
    assert layer.weight is parameter
    assert torch.equal(layer.weight, before)
    mask = torch.rand_like(before, dtype=torch.float32) > 0.5
    assert torch.equal(adapter.to_module_layout(layer, adapter.to_matrix_layout(layer, mask)), mask)


def test_columns_run_over_kernel_positions_then_channels() -> None:
    layer = nn.Conv2d(4, 2, (2, 3), groups=2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(layer.weight.numel()).reshape(layer.weight.shape))
    matrix = adapter_for(layer).weight_matrix(layer)
    for group in range(2):
        expected = [layer.weight[group, c, y, x].item() for y in range(2) for x in range(3) for c in range(2)]
        assert matrix[group, 0].tolist() == expected


def test_a_matrix_of_another_shape_is_refused_before_anything_changes() -> None:
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(ShapeError, match=r"\[1, 3, 4\]"):
        adapter_for(layer).write_weight_(layer, torch.zeros(3, 4))
    assert torch.equal(layer.weight, before)


def test_weights_can_be_written_in_inference_mode_and_trained_afterwards() -> None:
    layer = nn.Conv2d(3, 4, 3)
    adapter = adapter_for(layer)
    with torch.inference_mode():
        adapter.write_weight_(layer, adapter.weight_matrix(layer) * 0.5)
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    assert layer.weight.grad is not None


def test_half_precision_inputs_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 4).to(torch.bfloat16)
    x = torch.randn(64, 16).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = accumulated(layer, x, 64).finalise().full()
    torch.testing.assert_close(result, measured_hessian_linear(x, 64), rtol=1e-5, atol=1e-6)
