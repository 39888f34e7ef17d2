"""What every adapter is held to: autograd's Jacobian, and the output error of the real layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_obc.calibration import HessianAccumulator
from lightning_obc.layers import adapter_for


def measured_hessian(layer: nn.Module, x: Tensor) -> Tensor:
    """``2/n Σ J Jᵀ``, ``[g, d, d]``, with J the derivatives of the outputs in the first row of each group."""
    layer = copy.deepcopy(layer).double()
    adapter = adapter_for(layer)
    shape = adapter.shape(layer)
    names = {id(p): n for n, p in layer.named_parameters()}
    weight = adapter.weight(layer)
    key = names[id(weight)]

    def output(value: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {key: value}, (x.double(),))

    jacobian = torch.func.jacrev(output)(weight.detach()).reshape(-1, *weight.shape)
    rows = torch.stack([adapter.to_matrix_layout(layer, row) for row in jacobian])  # [outputs, g, R, d]
    first = rows[:, :, 0, :]
    assert rows.shape[1:] == (shape.groups, shape.rows, shape.columns)
    return 2 / x.shape[0] * torch.einsum("ogi,ogj->gij", first, first)


def accumulated(layer: nn.Module, x: Tensor, batch: int) -> HessianAccumulator:
    statistic = HessianAccumulator(layer, name="layer")
    statistic.begin_batch(batch)
    statistic.update(adapter_for(layer).inputs(layer, (x,), {}))
    return statistic


def assert_predicts_output_error(layer: nn.Module, x: Tensor, batch: int) -> None:
    """``½ tr(ΔW H ΔWᵀ)`` is the squared output error per sample that the real layer makes."""
    adapter = adapter_for(layer)
    hessian = accumulated(layer, x, batch).finalise().full()
    before = adapter.weight_matrix(layer)
    delta = torch.randn_like(before)
    changed = copy.deepcopy(layer)
    adapter.write_weight_(changed, before + delta)
    delta = (adapter.weight_matrix(changed) - before).double()
    predicted = 0.5 * torch.einsum("gri,gij,grj->", delta, hessian, delta)
    with torch.no_grad():
        error = changed.double()(x.double()) - copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(predicted, error.square().sum() / batch, rtol=1e-6, atol=0)


def measured_hessian_linear(x: Tensor, n: int) -> Tensor:
    flat = x.double().reshape(-1, x.shape[-1])
    return (2 / n * flat.T @ flat).unsqueeze(0)
