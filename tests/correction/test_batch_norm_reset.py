"""Batch-norm reset against statistics computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thread_ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_obc.correction import reset_batch_norm
from lightning_obc.errors import (
    CalibrationError,
    EmptyCalibrationError,
    LayerNotFoundError,
    LayerNotReachedError,
    NonFiniteError,
    SpecError,
)


class Net(nn.Module):
    """Convolutions with batch-norm, dropout, and a buffer that every forward pass in train mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.norm2 = nn.Conv2d(6, 5, 3, stride=2), nn.BatchNorm2d(5, momentum=None)
        self.never = nn.BatchNorm2d(4)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.drop(F.relu(self.norm1(self.conv1(x))))
        return self.norm2(self.conv2(x)).mean((2, 3))


def _net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for norm in (net.norm1, net.norm2, net.never):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 9)
    return net


def _batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 9, 9, generator=generator) * 2 + 0.5 for size in sizes]


def _by_hand(net: Net, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Averages, weighted by batch size, of each batch's means and unbiased variances; batch-norm written out."""
    sums: dict[str, list[Any]] = {"norm1": [0, 0], "norm2": [0, 0]}
    samples = sum(len(batch) for batch in batches)

    def normalise(name: str, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
        sums[name][0] += mean * len(x) / samples
        sums[name][1] += variance * len(x) / samples
        biased = x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (biased[:, None, None] + norm.eps).sqrt()
        return x * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]

    with torch.no_grad():
        for batch in batches:
            x = F.conv2d(batch.double(), net.conv1.weight.double())
            x = F.relu(normalise("norm1", net.norm1, x))
            assert net.conv2.bias is not None
            normalise("norm2", net.norm2, F.conv2d(x, net.conv2.weight.double(), net.conv2.bias.double(), stride=2))
    return {name: (mean, variance) for name, (mean, variance) in sums.items()}


def _snapshot(net: nn.Module, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items() if not key.startswith(without or ("?",))}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 2, 7), (6,)], ids=str)
def test_exact_average_over_a_full_pass(sizes: tuple[int, ...]) -> None:
    net, batches = _net(), _batches(*sizes)
    expected = _by_hand(net, batches)
    report = reset_batch_norm(net, batches, batches_limit=None)
    for name, norm in (("norm1", net.norm1), ("norm2", net.norm2)):
        torch.testing.assert_close(norm.running_mean, expected[name][0].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, expected[name][1].float(), rtol=1e-5, atol=1e-6)
        assert int(norm.num_batches_tracked) == len(sizes)
    assert [row.name for row in report.layers] == ["norm1", "norm2"]
    assert report.batches == len(sizes)
    assert all(row.before > 0.1 for row in report.layers)


def test_momentum_follows_pytorch_from_a_fresh_start() -> None:
    net, batches = _net(), _batches(4, 4, 4)
    twin = _net()
    twin.norm1.momentum = 0.1
    twin.norm1.reset_running_stats()
    twin.eval()
    twin.norm1.train()
    with torch.no_grad():
        for batch in batches:
            twin.norm1(twin.conv1(batch))
    reset_batch_norm(net, batches, momentum=0.1)
    torch.testing.assert_close(net.norm1.running_mean, twin.norm1.running_mean)
    torch.testing.assert_close(net.norm1.running_var, twin.norm1.running_var)


def test_batches_limit_counts() -> None:
    first, second, batches = _net(), _net(), _batches(4, 4, 4)
    assert reset_batch_norm(first, batches, batches_limit=2).batches == 2
    reset_batch_norm(second, batches[:2], batches_limit=None)
    assert _same(_snapshot(first), _snapshot(second))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool) -> None:
    net = _net().train(training)
    net.drop.train(not training)
    modes = {name: module.training for name, module in net.named_modules()}
    before = _snapshot(net, ("norm1.running", "norm2.running", "norm1.num", "norm2.num"))
    random = torch.get_rng_state()
    report = reset_batch_norm(net, _batches(4, 4))
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert _same(_snapshot(net, ("norm1.running", "norm2.running", "norm1.num", "norm2.num")), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert (net.norm1.momentum, net.norm2.momentum, net.never.momentum) == (0.3, None, 0.1)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert report.skipped == {"never": "no batch passes through it"}


def test_works_in_inference_mode_and_trains_on_afterwards() -> None:
    inside, outside, batches = _net(), _net(), _batches(4, 4)
    with torch.inference_mode():
        reset_batch_norm(inside, batches)
    reset_batch_norm(outside, batches)
    assert _same(_snapshot(inside), _snapshot(outside))
    inside.train()(batches[0]).sum().backward()
    assert inside.conv1.weight.grad is not None


def test_sync_batch_norm_equals_batch_norm_on_one_process() -> None:
    plain, batches = _net(), _batches(4, 3)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(_net())
    assert isinstance(synced.norm1, nn.SyncBatchNorm)
    reset_batch_norm(plain, batches)
    reset_batch_norm(synced, batches)
    torch.testing.assert_close(synced.norm2.running_var, plain.norm2.running_var)
    torch.testing.assert_close(synced.norm2.running_mean, plain.norm2.running_mean)


def test_a_layer_that_is_called_twice_averages_over_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(2 * x[:4] + 1).sum()

    net, x = Twice(), torch.randn(12, 3)
    reset_batch_norm(net, [x])
    other = 2 * x[:4] + 1
    expected = (12 * x.mean(0) + 4 * other.mean(0)) / 16
    torch.testing.assert_close(net.norm.running_mean, expected)
    torch.testing.assert_close(net.norm.running_var, (12 * x.var(0) + 4 * other.var(0)) / 16)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_ranks_agree_with_one_process(momentum: float | None) -> None:
    """Two ranks with five batches of unequal size, the last of them on one rank alone."""
    batches = _batches(4, 4, 4, 3, 3)

    def work(ranks: Any = None) -> dict[str, Tensor]:
        net = _net()
        report = reset_batch_norm(net, batches, momentum=momentum, ranks=ranks)
        assert report.batches == len(batches)
        return _snapshot(net)

    alone, together = work(), run_ranks(2, work)
    assert all(torch.equal(together[0][key], together[1][key]) for key in alone)
    for key, value in alone.items():
        torch.testing.assert_close(together[0][key], value, rtol=1e-6, atol=1e-6)


NAMES = ("norm1", "norm2")


def test_layers_and_exclude_choose_norm_layers() -> None:
    net = _net()
    before = _snapshot(net)
    report = reset_batch_norm(net, _batches(4), layers=["BatchNorm2d"], exclude=["*1", "never"])
    assert [row.name for row in report.layers] == ["norm2"]
    assert torch.equal(net.get_buffer("norm1.running_mean"), before["norm1.running_mean"])
    assert not torch.equal(net.get_buffer("norm2.running_mean"), before["norm2.running_mean"])


def test_progress_is_told() -> None:
    calls: list[tuple[str, float, float]] = []
    reset_batch_norm(_net(), _batches(4, 4), progress=lambda *call: calls.append(call))
    assert [call[1:] for call in calls] == [(0, 2), (1, 2), (2, 2)]


def _with_nan(net: Net) -> list[Tensor]:
    batches = _batches(4, 4)
    batches[1][0, 0, 0, 0] = float("nan")
    return batches


@pytest.mark.parametrize(
    ("error", "match", "data"),
    [
        (EmptyCalibrationError, "no batch", lambda net: []),
        (NonFiniteError, "norm1", _with_nan),
        (CalibrationError, "single value per channel", lambda net: [torch.randn(1, 3, 5, 5)]),
    ],
    ids=["empty", "nan", "one value"],
)
def test_bad_batches_are_named_and_change_nothing(
    error: type[Exception], match: str, data: Callable[[Net], list[Tensor]]
) -> None:
    net = _net()
    before, modes = _snapshot(net), [module.training for module in net.modules()]
    with pytest.raises(error, match=match):
        reset_batch_norm(net, data(net))
    assert _same(_snapshot(net), before)
    assert [module.training for module in net.modules()] == modes
    assert net.norm1.momentum == 0.3


def test_models_without_running_statistics_are_refused() -> None:
    with pytest.raises(LayerNotFoundError, match="no normalisation layer"):
        reset_batch_norm(nn.Linear(3, 3), [torch.randn(2, 3)])
    with pytest.raises(LayerNotFoundError, match="no batch-norm layer"):
        reset_batch_norm(nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False)), [])
    with pytest.raises(LayerNotReachedError):
        reset_batch_norm(_net(), _batches(2), forward=lambda model, batch: batch)
    with pytest.raises(SpecError, match="momentum"):
        reset_batch_norm(_net(), _batches(2), momentum=0.0)
