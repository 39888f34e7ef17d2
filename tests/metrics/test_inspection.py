"""Figures that are read off the weights agree with what made the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_obc as obc
from lightning_obc import metrics
from lightning_obc.errors import SpecError
from lightning_obc.metrics.inspection import grid_bits

GENERATOR = torch.Generator().manual_seed(0)


def on_grid(rows: int, columns: int, bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows on grids of their own, all codes possible, the ends taken."""
    codes = torch.randint(0, 2**bits, (rows, columns), generator=GENERATOR)
    codes[:, 0], codes[:, -1] = 0, 2**bits - 1
    scale = torch.rand(rows, 1, generator=GENERATOR) + 0.1
    return (scale * (codes - 2 ** (bits - 1))).to(dtype)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [9, 64, 257])
def test_grids_are_recognised(bits, columns):
    assert grid_bits(on_grid(32, columns, bits)) == bits


@pytest.mark.parametrize("columns", [3, 9, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dense_weights_are_on_no_grid(columns, dtype):
    weight = torch.randn(16, columns, generator=GENERATOR).to(dtype)
    assert grid_bits(weight) is None
    assert grid_bits(weight.masked_fill(torch.rand(16, columns, generator=GENERATOR) < 0.5, 0)) is None


@pytest.mark.parametrize("bits", [2, 4])
def test_low_precision_does_not_hide_a_narrow_grid(bits):
    assert grid_bits(on_grid(32, 64, bits, torch.bfloat16)) == bits
    assert grid_bits(on_grid(32, 64, bits, torch.float16)) == bits


def test_one_row_off_the_grid_is_enough():
    rows = on_grid(64, 64, 4)
    rows[37, 5] *= 1.01
    assert grid_bits(rows) is None


def test_few_values_give_no_evidence():
    """Two values lie on a grid whatever they are; so do rows that a pruning left with one weight."""
    rows = torch.zeros(16, 9)
    rows[:, 3] = torch.randn(16, generator=GENERATOR)
    assert grid_bits(rows) is None
    assert grid_bits(torch.zeros(4, 8)) is None


def test_grids_of_groups_need_their_size():
    groups = on_grid(32, 16, 4)
    layer = nn.Linear(64, 8)
    layer.weight.data.copy_(groups.reshape(8, 64))
    assert metrics.inspect_model(layer).bits == 32
    assert metrics.inspect_model(layer, group_size=16).bits == 4


@pytest.fixture(scope="module")
def compressed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    report = obc.compress(
        model, torch.randn(64, 4, 6, 6), [obc.Prune("2:4"), obc.Quantize(4, layers=["0"])], calibration=None
    )
    return model, report


def test_agrees_with_the_report_of_a_compression(compressed):
    model, report = compressed
    found = metrics.inspect_model(model)
    rows = {layer.name: layer for layer in found.layers}
    assert found.conformity == {"2:4": 1.0}
    assert {name: row.bits for name, row in rows.items()} == {"0": 4, "3": 32}
    for name, layer in report.layers.items():
        assert rows[name].sparsity == pytest.approx(layer.sparsity)
        assert rows[name].shape == layer.shape
    parameters = dict(model.named_parameters())
    storage = {
        "0.weight": metrics.Storage(4, obc.NM(2, 4), 8),
        "3.weight": metrics.Storage(32, obc.NM(2, 4), 0),
    }
    assert found.compression_ratio == pytest.approx(float(metrics.compression_ratio(parameters, storage)))
    assert found.bits == pytest.approx((4 * 288 + 32 * 1152) / 1440)


def test_conformity_is_a_share_of_groups_and_left_out_where_the_pattern_does_not_divide():
    dense = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(6, 2, bias=False))
    found = metrics.inspect_model(dense, patterns=["2:4", "1:2"])
    assert found.layers[0].conformity == {"2:4": 0.0, "1:2": 0.0}
    assert found.layers[1].conformity == {"1:2": 0.0}
    dense[0].weight.data[:2, [0, 1, 4, 5]] = 0
    assert metrics.inspect_model(dense).conformity == {"2:4": 0.5}
    assert metrics.inspect_model(dense).compression_ratio > 1


def test_an_embedding_has_bits_but_no_groups():
    found = metrics.inspect_model(nn.Embedding(10, 8))
    assert found.layers[0].conformity == {}


def test_only_groups_can_be_looked_for():
    with pytest.raises(SpecError, match="Only N:M patterns"):
        metrics.inspect_model(nn.Linear(4, 2), patterns=["0.5"])
