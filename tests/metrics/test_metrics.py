"""Each metric, as function and as class, against a count written out with NumPy or by hand."""

from __future__ import annotations

import doctest
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_obc import metrics as m
from lightning_obc.errors import LayerNotFoundError, ShapeError
from lightning_obc.grids import Grid
from lightning_obc.metrics import functional
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, IntGrid, Unstructured


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "a": torch.randn(6, 8, generator=generator),
        "b.weight": torch.randn(3, 4, 2, 2, generator=generator),
    }
    made["a"][made["a"].abs() < 0.7] = 0
    made["b.weight"][0] = -0.0
    return made


def zeros(weight: torch.Tensor) -> int:
    return int(np.count_nonzero(weight.numpy() == 0))


def test_sparsity_counts_zeros_of_either_sign(weights):
    expected = sum(map(zeros, weights.values())) / sum(w.numel() for w in weights.values())
    metric = m.Sparsity()
    metric.update(weights)
    assert m.sparsity(weights).item() == pytest.approx(expected, rel=1e-12)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def test_layer_sparsity(weights):
    metric = m.LayerSparsity(list(weights))
    metric.update(weights)
    for name, weight in weights.items():
        expected = zeros(weight) / weight.numel()
        assert m.layer_sparsity(weights)[name].item() == pytest.approx(expected)
        assert metric.compute()[name].item() == pytest.approx(expected)


def test_average_bits_weighs_by_size(weights):
    storage = {"a": m.Storage(bits=4)}
    expected = (48 * 4 + 48 * 32) / 96
    metric = m.AverageBits()
    metric.update(weights, storage)
    assert m.average_bits(weights, storage).item() == expected
    assert metric.compute().item() == expected


@pytest.mark.parametrize(
    ("storage", "bits"),
    [
        (m.Storage(), lambda w: (w.numel() - zeros(w)) * 32 + w.numel()),
        (m.Storage(pattern=Unstructured(0.5)), lambda w: (w.numel() - zeros(w)) * 32 + w.numel()),
        (m.Storage(pattern=NM(2, 4)), lambda w: w.numel() / 2 * 32 + w.numel() / 4 * 3),
        (m.Storage(4, NM(2, 4), scales=6), lambda w: w.numel() / 2 * 4 + w.numel() / 4 * 3 + 6 * 36),
        (m.Storage(8, None, scales=6), lambda w: (w.numel() - zeros(w)) * 8 + w.numel() + 6 * 40),
        (m.Storage(pattern=Block(4, 0.5)), lambda w: (w.numel() - zeros(w)) * 32 + w.numel() / 4),
    ],
)
def test_bytes_of_a_weight(weights, storage, bits):
    assert storage.size(weights["a"]) == bits(weights["a"]) / 8


def test_a_bitmap_that_saves_nothing_is_left_out():
    assert m.Storage().size(torch.ones(4, 4)) == 64


def test_compression_ratio_keeps_the_rest_dense(weights):
    storage = {"a": m.Storage(4, NM(2, 4), scales=6)}
    compressed = (48 / 2 * 4 + 48 / 4 * 3 + 6 * 36) / 8 + 48 * 4
    metric = m.CompressionRatio()
    metric.update(weights, storage)
    assert m.compression_ratio(weights, storage).item() == pytest.approx(96 * 4 / compressed)
    assert metric.compute().item() == pytest.approx(96 * 4 / compressed)
    assert m.compression_ratio({}, {}).item() == 1


def test_relative_error_sums_over_batches():
    generator = torch.Generator().manual_seed(0)
    dense, compressed = torch.randn(2, 10, 3, generator=generator), torch.randn(2, 10, 3, generator=generator)
    metric = m.RelativeError(["fc", "unused"])
    for ours, reference in zip(compressed, dense, strict=True):
        metric.update("fc", ours, reference)
    a, b = compressed.double().numpy(), dense.double().numpy()
    expected = ((a - b) ** 2).sum() / (b**2).sum()
    assert metric.compute()["fc"].item() == pytest.approx(expected)
    assert m.relative_error(compressed, dense).item() == pytest.approx(expected)
    assert metric.compute()["unused"].item() == 0
    assert m.relative_error(dense, dense).item() == 0


def test_storage_of_a_solution():
    grid = Grid(IntGrid(3), torch.ones(1, 4, 1), torch.zeros(1, 4, 1))
    weight = torch.zeros(1, 4, 8)
    solution = LayerSolution(weight, weight.bool(), 0.0, 0.0, 1.0, grid=grid)
    assert m.Storage.of(solution, NM(2, 4)) == m.Storage(3, NM(2, 4), 4)
    assert m.Storage.of(LayerSolution(weight, weight.bool(), 0.0, 0.0, 1.0)) == m.Storage()


def test_counts_of_replicated_weights_are_not_summed_over_ranks(weights):
    for metric in (m.Sparsity(), m.LayerSparsity(list(weights)), m.AverageBits(), m.CompressionRatio()):
        reduce = metric._reductions["counts"]
        twice = torch.stack([metric.counts + 3, metric.counts + 3])
        assert torch.equal(reduce(twice), metric.counts + 3)
    errors = m.RelativeError(["a"])
    assert torch.equal(errors._reductions["sums"](torch.ones(2, 1, 2)), torch.full((1, 2), 2.0))


def test_metrics_reset_and_pickle(weights):
    metric = pickle.loads(pickle.dumps(m.Sparsity()))
    metric.update(weights)
    metric.reset()
    metric.update({"a": torch.zeros(3)})
    assert metric.compute().item() == 1


def test_bad_input(weights):
    with pytest.raises(LayerNotFoundError, match="nowhere"):
        m.average_bits(weights, {"nowhere": m.Storage()})
    with pytest.raises(LayerNotFoundError, match="nowhere"):
        m.compression_ratio(weights, {"nowhere": m.Storage()})
    with pytest.raises(LayerNotFoundError, match="nowhere"):
        m.LayerSparsity(["a"]).update({"nowhere": torch.ones(2)})
    with pytest.raises(ShapeError, match=r"\(2,\) and \(3,\)"):
        m.relative_error(torch.ones(2), torch.ones(3))


def test_docstring_examples_are_true():
    assert doctest.testmod(functional).failed == 0
    assert doctest.testmod(functional).attempted > 0
    assert math.isclose(m.sparsity({"a": torch.tensor([0.0, 1.0])}).item(), 0.5)
