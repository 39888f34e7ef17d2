"""One table: every kind of layer × what compression promises of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_rows import ROWS, Row, measured_error
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.layers import adapter_for, is_lookup, select_layers, unsupported_layers
from lightning_obc.planning import plan_stage

POOLED = [name for name in ROWS if "grouped" in name or "depthwise" in name]


def made(name: str) -> Row:
    if "transformers" in name:
        pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    torch.manual_seed(sum(map(ord, name)))
    return ROWS[name]


def in_double(value: Any) -> Any:
    """Inputs in float64; token indices as they are."""
    if type(value) is tuple:
        first, *rest = (in_double(x) for x in value)
        # Self-attention shows itself by three times the same tensor.
        return (first, *(first if all(x is value[0] for x in value) else x for x in rest))
    return value if isinstance(value, Tensor) and not value.is_floating_point() else value.double()


def run(model: nn.Module, batches: list[Any], stages: Any, **options: Any) -> obc.CompressionReport:
    """Batches carry a tensor of the four samples first: the layout of sequences differs from row to row."""
    options |= {"forward": lambda m, batch: m(batch[1]), "on_failure": "raise"}
    return obc.compress(model, [(torch.zeros(4), batch) for batch in batches], stages, **options)


def assert_losses_are_output_errors(row: Row, kind: type[obc.Prune | obc.Quantize], value: Any, **spec: Any) -> None:
    """Layer by layer, the others staying as they are."""
    dense = row.make().double().eval()
    batches = [in_double(row.inputs()) for _ in range(2)]
    for name, module in select_layers(dense).items():
        if kind is obc.Prune and is_lookup(module):
            continue
        small = copy.deepcopy(dense)
        report = run(small, batches, kind(value, layers=[name]), calibration=obc.Calibration(**spec))
        loss, error = report.layers[name].loss, measured_error(row, dense, small, name, batches)
        assert loss == pytest.approx(error, rel=1e-9)
        assert loss > 0


@pytest.mark.parametrize("name", ROWS)
def test_predicted_loss_is_the_measured_output_error(name: str) -> None:
    row = made(name)
    assert_losses_are_output_errors(row, obc.Prune, 0.5)
    assert_losses_are_output_errors(row, obc.Quantize, 3)


@pytest.mark.parametrize("name", POOLED)
def test_pooled_groups_are_measured_each_with_its_own_inputs(name: str) -> None:
    assert_losses_are_output_errors(made(name), obc.Prune, 0.5, pooled=True)


@pytest.mark.parametrize("name", ROWS)
def test_without_sparsity_every_bit_stays(name: str) -> None:
    row = made(name)
    model, batches = row.make(), [row.inputs()]
    before = copy.deepcopy(model.state_dict())
    report = run(model, batches, obc.Prune(0.0))
    assert all(layer.compressed and layer.loss == 0 for layer in report.stages[0].layers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def on_a_grid(shape: tuple[int, ...]) -> Tensor:
    """Weights ``[g, R, d]`` on 8-bit grids per row, with both ends in use and powers of 2 as steps."""
    codes = torch.randint(0, 256, shape)
    codes[..., 0], codes[..., 1] = 0, 255
    zeros = torch.randint(0, 256, (*shape[:-1], 1))
    return (codes - zeros).float() * 2.0 ** torch.randint(-12, -6, (*shape[:-1], 1))


@pytest.mark.parametrize("name", ROWS)
def test_weights_on_an_8_bit_grid_stay(name: str) -> None:
    row = made(name)
    model, batches = row.make(), [row.inputs()]
    for module in select_layers(model).values():
        adapter = adapter_for(module)
        adapter.write_weight_(module, on_a_grid(tuple(adapter.weight_matrix(module).shape)))
    before = {key: adapter_for(module).weight_matrix(module) for key, module in select_layers(model).items()}
    run(model, batches, obc.Quantize(8))
    for key, module in select_layers(model).items():
        after = adapter_for(module).weight_matrix(module)
        rounding = 0.0 if row.exact else 1e-5
        torch.testing.assert_close(after, before[key], rtol=rounding, atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_a_network_runs_before_and_after_and_the_plan_is_kept(name: str) -> None:
    row = made(name)
    model, batches = row.make().eval(), [row.inputs(), row.inputs()]
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    fits = "depthwise" not in name
    stages = [obc.Prune("2:4" if fits else 0.5, misfit="skip"), obc.Quantize(4)]
    pruned, quantized = (set(plan_stage(model, stage).modules) for stage in stages)
    assert unsupported_layers(model) == {}
    dense = [model(batch) for batch in batches]
    report = run(model, batches, stages)
    assert [{layer.name for layer in stage.layers} for stage in report.stages] == [pruned, quantized]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    for batch, output in zip(batches, dense, strict=True):
        small = model(batch)
        assert small.shape == output.shape
        assert bool(small.isfinite().all())
        assert not torch.equal(small, output)
    for key, module in select_layers(model).items():
        matrix = adapter_for(module).weight_matrix(module)
        if key in pruned and fits:
            assert int((matrix.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) <= 2
        elif key in pruned:
            assert int((matrix == 0).sum()) >= matrix.numel() // 2
        # A parametrization returns the points of the grid up to rounding.
        points = matrix if row.exact else (matrix * 1e5).round()
        assert all(len(row.unique()) <= 16 for row in points.flatten(0, 1))
