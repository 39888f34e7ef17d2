"""Statistics and bias correction against moments computed on all values at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from thread_ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_obc.correction import (
    NormStatistics,
    correct_bias,
    correct_statistics,
    record_statistics,
    reset_batch_norm,
)
from lightning_obc.errors import (
    EmptyCalibrationError,
    LayerNotFoundError,
    LayerNotReachedError,
    NonFiniteError,
    ShapeError,
    SpecError,
)
from lightning_obc.layers import select_layers


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True))))


class Residual(nn.Module):
    """A small residual network; ``never`` is registered but not used, ``plain`` has no affine parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.plain = nn.BatchNorm2d(width, affine=False)
        self.never = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.blocks(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Tokens(nn.Module):
    """Layer-norms over the last axis, over two axes, without a bias and as in channels-last convolution networks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1 = nn.Linear(6, 8), nn.LayerNorm(8)
        self.mix, self.norm2 = nn.Linear(8, 8), nn.LayerNorm((5, 8))
        self.down, self.norm3 = nn.Linear(8, 8), nn.RMSNorm(8)
        self.group = nn.GroupNorm(2, 8)
        self.last = ChannelsFirst(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.embed(x)))
        x = x + self.norm3(self.down(F.gelu(self.norm2(self.mix(x)))))
        return self.last(self.group(x.movedim(2, 1)).unsqueeze(-1).expand(-1, -1, -1, 8))


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _trained_like(net: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Norm layers as after training: scales and shifts of their own, and true running statistics."""
    for module in net.modules():
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 1:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        reset_batch_norm(net, batches)
    return net.eval()


def _pruned(net: nn.Module, share: float) -> nn.Module:
    small = copy.deepcopy(net)
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                threshold = module.weight.abs().flatten().kthvalue(int(share * module.weight.numel())).values
                module.weight[module.weight.abs() <= threshold] = 0
    return small


def _residual(share: float = 0.7) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    batches = [torch.randn(size, 3, 10, 10) + 0.7 for size in (8, 8, 5)]
    dense = _trained_like(Residual(), batches)
    return dense, _pruned(dense, share), batches


def _tokens(share: float = 0.5) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    batches = [torch.randn(size, 5, 6) for size in (16, 9)]
    dense = _trained_like(Tokens(), batches)
    return dense, _pruned(dense, share), batches


def _outputs(net: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """All output values of a module ``[samples, …]``, float64."""
    found: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, a, output: found.append(output.double()))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    handle.remove()
    return torch.cat(found)


BATCH_NORMS = ["norm", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"]


def _moments(y: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return y.mean(dims), y.std(dims, correction=0)


def _changed(first: nn.Module, second: nn.Module) -> set[str]:
    after = second.state_dict()
    return {key for key, value in first.state_dict().items() if not torch.equal(value, after[key])}


def test_recorded_moments_are_those_of_all_values() -> None:
    dense, _, batches = _residual()
    before = copy.deepcopy(dense)
    statistics = record_statistics(dense.train(), batches)
    assert list(statistics.channels) == [*BATCH_NORMS, "plain"]
    assert statistics.skipped == {"never": "no batch passes through it"}
    assert not _changed(before, dense)
    assert all(module.training for module in dense.modules())
    for name, moments in statistics.channels.items():
        mean, std = _moments(_outputs(dense.eval(), name, batches), (0, 2, 3))
        torch.testing.assert_close(moments.mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.std, std, rtol=1e-5, atol=1e-6)
        assert moments.values == 21 * 64


@pytest.mark.parametrize("exponent", [-100, 100])
def test_moments_of_outputs_whose_squares_leave_float32(exponent: int) -> None:
    norm, x = nn.BatchNorm2d(3, affine=False).eval(), torch.randn(4, 3, 5, 5)
    norm.eps = 0.0
    plain = record_statistics(norm, [x]).channels[""]
    scaled = record_statistics(norm, [x * 2.0**exponent]).channels[""]
    torch.testing.assert_close(scaled.mean, plain.mean * 2.0**exponent, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.std, plain.std * 2.0**exponent, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "dense model"])
def test_batch_norm_outputs_get_the_dense_moments(recorded: bool) -> None:
    dense, small, batches = _residual()
    untouched = copy.deepcopy(small)
    reference = record_statistics(dense, batches) if recorded else dense
    report = correct_statistics(small, reference, batches)
    for name in BATCH_NORMS:
        mean, std = _moments(_outputs(dense, name, batches), (0, 2, 3))
        new_mean, new_std = _moments(_outputs(small, name, batches), (0, 2, 3))
        torch.testing.assert_close(new_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new_std, std, rtol=1e-4, atol=1e-4)
        old_mean, _ = _moments(_outputs(untouched, name, batches), (0, 2, 3))
        assert (old_mean - mean).abs().max() > 0.05
    assert [row.name for row in report.layers] == BATCH_NORMS
    assert all(row.after is not None and row.after < 1e-3 < row.before for row in report.layers)
    assert report.skipped == {"plain": "it has no affine parameters", "never": "no batch passes through it"}
    assert _changed(untouched, small) == {f"{name}.{key}" for name in BATCH_NORMS for key in ("weight", "bias")}


def test_layer_norm_outputs_get_the_dense_moments() -> None:
    dense, small, batches = _tokens()
    report = correct_statistics(small, dense, batches)
    dims = {"norm1": (0, 1), "norm2": (0,), "group": (0, 2), "last": (0, 2, 3)}
    for name, axes in dims.items():
        mean, std = _moments(_outputs(dense, name, batches), axes)
        new_mean, new_std = _moments(_outputs(small, name, batches), axes)
        torch.testing.assert_close(new_mean, mean, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(new_std, std, rtol=1e-4, atol=2e-4)
    std, new_std = (_moments(_outputs(net, "norm3", batches), (0, 1))[1] for net in (dense, small))
    torch.testing.assert_close(new_std, std, rtol=1e-4, atol=1e-4)
    notes = {row.name: row.note for row in report.layers}
    assert list(notes) == ["norm1", "norm2", "norm3", "group", "last"]
    assert notes == dict.fromkeys(notes, "") | {"norm3": "no shift to correct the mean with"}


def test_one_pass_for_all_layers_would_not_do() -> None:
    """Measured with the earlier layers uncorrected, the later ones miss: the order matters."""
    dense, small, batches = _residual()
    for name in BATCH_NORMS:
        alone = copy.deepcopy(small)
        correct_statistics(alone, dense, batches, layers=[name])
        fixed = alone.get_submodule(name)
        small.get_submodule(name).correction = (fixed.weight.detach(), fixed.bias.detach())  # type: ignore[assignment]
    with torch.no_grad():
        for name in BATCH_NORMS:
            module: Any = small.get_submodule(name)
            module.weight.copy_(module.correction[0])
            module.bias.copy_(module.correction[1])
    name = BATCH_NORMS[-1]
    mean, _ = _moments(_outputs(dense, name, batches), (0, 2, 3))
    new_mean, _ = _moments(_outputs(small, name, batches), (0, 2, 3))
    assert (new_mean - mean).abs().max() > 0.01


@pytest.mark.parametrize("make", [_residual, _tokens])
def test_correction_lowers_the_output_error_of_a_heavily_pruned_net(make: Callable[..., Any]) -> None:
    dense, small, batches = make(0.8)
    torch.manual_seed(5)
    fresh = torch.randn(64, *batches[0].shape[1:]) + batches[0].mean()
    with torch.no_grad():
        wanted = dense(fresh)
        before = (small(fresh) - wanted).square().mean()
        correct_statistics(small, dense, batches)
        after = (small(fresh) - wanted).square().mean()
    assert after < 0.8 * before


def test_reset_lowers_the_output_error_of_a_heavily_pruned_net() -> None:
    dense, small, batches = _residual(0.8)
    torch.manual_seed(5)
    fresh = torch.randn(64, 3, 10, 10) + 0.7
    with torch.no_grad():
        before = (small(fresh) - dense(fresh)).square().mean()
        reset_batch_norm(small, batches)
        assert (small(fresh) - dense(fresh)).square().mean() < 0.8 * before


def test_the_correction_lives_in_the_state_dict() -> None:
    dense, small, batches = _tokens()
    correct_statistics(small, dense, batches)
    loaded = Tokens().eval()
    loaded.load_state_dict(small.state_dict())
    assert torch.equal(loaded(batches[0]), small(batches[0]))
    assert not any(module._forward_hooks for module in small.modules())


def test_an_uncompressed_model_stays_as_it_is() -> None:
    dense, _, batches = _residual()
    same = copy.deepcopy(dense)
    report = correct_statistics(same, dense, batches)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value, rtol=1e-5, atol=1e-5)
    assert all(row.before < 1e-6 for row in report.layers)


def test_channels_without_variance_are_shifted_only() -> None:
    dense, small, batches = _residual()
    norm: Any = small.get_submodule("norm")
    stem: Any = small.get_submodule("stem")
    with torch.no_grad():
        stem.weight[2] = 0
    scale = norm.weight.detach().clone()
    report = correct_statistics(small, dense, batches, max_ratio=1.01)
    assert torch.isfinite(norm.weight).all()
    assert norm.weight[2] == scale[2]
    mean, _ = _moments(_outputs(dense, "norm", batches), (0, 2, 3))
    new_mean, _ = _moments(_outputs(small, "norm", batches), (0, 2, 3))
    torch.testing.assert_close(new_mean, mean, rtol=1e-4, atol=1e-4)
    ratio = norm.weight.detach() / scale
    assert float(ratio.max()) <= 1.01 + 1e-6
    assert float(ratio.min()) >= 1 / 1.01 - 1e-6
    assert report.layers[0].note.startswith("1 channels without variance are shifted only; the scaling of ")


@pytest.mark.parametrize("correct", [correct_statistics, correct_bias])
def test_inference_mode_gives_the_same(correct: Callable[..., Any]) -> None:
    dense, small, batches = _residual()
    other = copy.deepcopy(small)
    random = torch.get_rng_state()
    with torch.inference_mode():
        correct(small, dense, batches)
    correct(other, dense, batches)
    assert not _changed(small, other)
    assert torch.equal(torch.get_rng_state(), random)
    small.train()(batches[0]).sum().backward()
    weight: Any = small.get_submodule("stem").weight
    assert weight.grad is not None


def test_an_activation_inside_a_norm_layer_is_reported() -> None:
    class NormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    net = nn.Sequential(nn.BatchNorm2d(3), NormAct(3)).eval()
    report = correct_statistics(net, copy.deepcopy(net), [torch.randn(4, 3, 5, 5)])
    assert [row.name for row in report.layers] == ["0"]
    assert "is not known" in report.skipped["1"]


def test_frozen_batch_norm_with_buffers_is_corrected() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.5), ("running_mean", 0.1), ("running_var", 2.0)):
                self.register_buffer(name, torch.full((size,), value))

        def forward(self, x: Tensor) -> Tensor:
            scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
            return (x - self.running_mean.view(1, -1, 1, 1)) * scale + self.bias.view(1, -1, 1, 1)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    small, batches = _pruned(dense, 0.6), [torch.randn(8, 3, 6, 6)]
    correct_statistics(small, dense, batches)
    mean, std = _moments(_outputs(dense, "1", batches), (0, 2, 3))
    new_mean, new_std = _moments(_outputs(small, "1", batches), (0, 2, 3))
    torch.testing.assert_close(new_mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new_std, std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process(size: int) -> None:
    """Three batches: with four ranks, one of them has none."""
    dense, small, _ = _residual()
    batches = list(torch.randn(18, 3, 10, 10).split([7, 6, 5]))

    def work(ranks: Any = None) -> dict[str, Tensor]:
        model = copy.deepcopy(small)
        correct_statistics(model, dense if ranks is None else copy.deepcopy(dense), batches, ranks=ranks)
        return model.state_dict()

    alone, together = work(), run_ranks(size, work)
    for key, value in alone.items():
        assert all(torch.equal(theirs[key], together[0][key]) for theirs in together)
        torch.testing.assert_close(together[0][key], value, rtol=1e-5, atol=1e-6)


# Biases.
def test_bias_correction_removes_the_mean_shift() -> None:
    dense, small, batches = _residual()
    untouched = copy.deepcopy(small)
    report = correct_bias(small, dense, batches)
    with_bias = ["blocks.0.conv1", "blocks.1.conv1", "head"]
    assert [row.name for row in report.layers] == with_bias
    assert set(report.skipped.values()) == {"it has no bias"}
    assert _changed(untouched, small) == {f"{name}.bias" for name in with_bias}
    for name, row in zip(with_bias, report.layers, strict=True):
        dims = (0,) if name == "head" else (0, 2, 3)
        mean, _ = _moments(_outputs(dense, name, batches), dims)
        torch.testing.assert_close(_moments(_outputs(small, name, batches), dims)[0], mean, rtol=1e-4, atol=1e-4)
        assert (_moments(_outputs(untouched, name, batches), dims)[0] - mean).abs().max() > 0.01
        assert row.after is not None
        assert row.after < 1e-4 < row.before


def test_bias_of_attention_and_transposed_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    dense, batches = Net().eval(), [torch.randn(7, 6, 8)]
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter[torch.rand_like(parameter) < 0.4] = 0
    recorded = record_statistics(dense, batches, layers=select_layers(dense))
    report = correct_bias(small, recorded, batches)
    assert [row.name for row in report.layers] == ["attention.out_proj", "up"]
    assert list(report.skipped) == ["attention.in_proj"]
    with torch.no_grad():
        wanted, got = (net.attention(*(3 * batches))[0].mean((0, 1)) for net in (dense, small))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    wanted, got = (_outputs(net, "up", batches).mean((0, 2)) for net in (dense, small))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# Bad input.
def test_bad_input_is_named_and_changes_nothing() -> None:
    dense, small, batches = _residual()
    before = copy.deepcopy(small)
    statistics = record_statistics(dense, batches)
    poisoned = [batches[0].clone(), batches[1].clone()]
    poisoned[1][0, 0, 0, 0] = float("inf")
    other = record_statistics(Residual(4), batches)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (EmptyCalibrationError, "no batch", lambda: correct_statistics(small, dense, [])),
        (NonFiniteError, "'norm'", lambda: correct_statistics(small, statistics, poisoned)),
        (ShapeError, "8 channels", lambda: correct_statistics(small, other, batches)),
        (LayerNotFoundError, "'norn'", lambda: correct_statistics(small, dense, batches, layers=["norn"])),
        (LayerNotReachedError, "statistics", lambda: correct_statistics(small, NormStatistics({}), batches)),
        (LayerNotReachedError, "No batch", lambda: record_statistics(dense, batches, forward=lambda m, b: b)),
        (SpecError, "max_ratio", lambda: correct_statistics(small, dense, batches, max_ratio=0.5)),
        (EmptyCalibrationError, "no batch", lambda: correct_bias(small, dense, iter(()))),
    ]
    for error, match, run in cases:
        with pytest.raises(error, match=match):
            run()
    assert not _changed(before, small)


def test_an_error_halfway_puts_everything_back() -> None:
    dense, small, batches = _residual()
    before, calls = copy.deepcopy(small), []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        calls.append(model)
        if len(calls) > 10:
            raise RuntimeError("interrupted")
        return model(batch)

    statistics = record_statistics(dense, batches)
    with pytest.raises(RuntimeError, match="interrupted"):
        correct_statistics(small, statistics, batches, forward=forward)
    assert not _changed(before, small)
