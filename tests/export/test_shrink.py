"""Channels that nothing reads leave, outputs stay, and what cannot be cut says why."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.activations import attached, unquantized
from lightning_obc.errors import ExportError, FingerprintError
from lightning_obc.export import (
    compressed_state,
    export_onnx,
    load_packed,
    open_session,
    read_onnx_weights,
    save_packed,
    shrink,
)
from lightning_obc.layers import adapter_for


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 4, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(32, 10),
    )


def unread_(model: nn.Module, name: str, channels: list[int], positions: int = 1) -> None:
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight.reshape(weight.shape[0], weight.shape[1] // positions, -1)[:, channels] = 0


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(model: nn.Module, small: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(copy.deepcopy(model).eval()(x), copy.deepcopy(small).eval()(x), rtol=1e-4, atol=1e-5)


def test_channels_leave_through_norms_activations_pooling_and_flattening() -> None:
    model = chain()
    model(IMAGES)  # running statistics that matter
    unread_(model, "1", [0, 3, 15])
    unread_(model, "5", [1, 2], positions=4)
    unread_(model, "9", list(range(20)))
    before = copy.deepcopy(model.state_dict())
    result = shrink(model, IMAGES)
    small: Any = result.model
    assert result.removed == {"1": 3, "5": 2, "9": 20}
    assert result.kept == {}
    shapes = [tuple(small.get_submodule(name).weight.shape) for name in ("0.0", "0.1", "1", "5", "6", "9")]
    assert shapes == [(13, 3, 3, 3), (13,), (22, 13, 3, 3), (12, 88), (12,), (10, 12)]
    assert (small[1].in_channels, small[1].out_channels, small[5].in_features, small[5].out_features) == (
        13,
        22,
        88,
        12,
    )
    assert same(model, small, IMAGES)
    assert list(small.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model is untouched"
    assert small.training
    assert result.after == sum(p.numel() for p in small.parameters()) < result.before
    small(IMAGES).sum().backward()
    assert f"{result.before / result.after:.2f}× fewer" in str(result)


def test_structured_pruning_becomes_smaller_files(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert runtime is not None
    model = chain().eval()
    obc.compress(model, torch.randn(64, 3, 8, 8), [obc.Prune(obc.Structured(0.5), exclude=["0.0"])])
    small = shrink(model, IMAGES).model
    assert small[0][0].out_channels == 8
    sizes = []
    for name, one in (("dense", model), ("small", small)):
        export_onnx(one, IMAGES, tmp_path / f"{name}.onnx")
        sizes.append((tmp_path / f"{name}.onnx").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    session = open_session(tmp_path / "small.onnx", threads=1)
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=1e-3, atol=1e-4)


def test_rows_that_leave_free_channels_before_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    unread_(model, "4", [0])
    with torch.no_grad():
        model[2].weight[1:, 5] = 0  # only the row that leaves reads channel 5
    assert shrink(model, torch.randn(3, 6)).removed == {"4": 1, "2": 1}
    unread_(model, "4", [0, 1, 2, 3])
    result = shrink(model, torch.randn(3, 2, 6))
    assert result.removed["4"] == 3, "one channel stays"
    assert same(model, result.model, torch.randn(7, 6))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.c(nn.functional.gelu(self.b(y)).contiguous()) + y


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Softmaxed(Reused):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.softmax(self.a(x), -1))


def test_only_what_nothing_else_sees_is_cut() -> None:
    torch.manual_seed(0)
    model = Residual()
    for name in "abc":
        unread_(model, name, [2, 4])
    result = shrink(model, torch.randn(3, 8))
    assert result.removed == {"c": 2}
    assert result.kept == {"a": "its input comes from outside", "b": "the model returns them"}
    assert "b: unread channels stay: the model returns them" in str(result)
    assert same(model, result.model, torch.randn(3, 8))


class Sums(nn.Module):
    """A residual stream of three layers, with two readers beside those of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 3, padding=1)
        self.head, self.side = nn.Linear(8, 5), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu_(self.stem(x))
        x = self.norm(self.down(x)) + x
        x = x + self.back(torch.relu(self.inner(x)))
        return self.head(x.mean((2, 3))), self.side(x)


def test_a_sum_is_cut_where_all_of_its_readers_leave_a_channel_unread() -> None:
    torch.manual_seed(0)
    model = Sums().eval()
    for name in ("down", "inner", "head"):
        unread_(model, name, [1, 4, 6])
    unread_(model, "side", [1, 4])
    images = torch.randn(2, 3, 6, 6)
    result = shrink(model, images)
    assert result.removed == {"down": 2, "inner": 2, "head": 2, "side": 2}
    assert result.kept == dict.fromkeys(("down", "inner", "head"), "side reads them")
    small: Any = result.model
    assert (small.stem.out_channels, small.back.out_channels, small.norm.num_features) == (6, 6, 6)
    with torch.no_grad():
        for a, b in zip(model.double()(images.double()), small.double()(images.double()), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_channels_of_a_sum_that_are_read_only_to_make_themselves_leave() -> None:
    """``back`` makes channel 3 out of channel 3, and nobody else reads it."""
    torch.manual_seed(0)
    model = Sums().eval()
    for name in ("down", "head", "side"):
        unread_(model, name, [3])
    with torch.no_grad():
        model.inner.weight[:, 3] = 0
        model.inner.weight[5] = 0
        model.inner.weight[5, 3] = 1.0
        model.back.weight[:, 5] = 0
        model.back.weight[3, 5] = 1.0
    result = shrink(model, torch.randn(2, 3, 6, 6))
    assert result.removed == {"down": 1, "inner": 1, "back": 1, "head": 1, "side": 1}


class Mobile(nn.Module):
    """Depthwise convolutions, a concatenation, a gate and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate, self.scale = nn.Conv2d(8, 8, 1), nn.Parameter(torch.rand(8, 1, 1))
        self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.depth(self.a(x)))
        y = y * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(y, 1))) * self.scale
        y = nn.functional.interpolate(nn.functional.pad(y, (1, 1)), scale_factor=2.0)
        z = nn.functional.interpolate(nn.functional.pad(self.b(x), (1, 1)), scale_factor=2.0)
        return self.c(torch.cat([y, z], 1))


def test_depthwise_convolutions_gates_and_concatenations() -> None:
    torch.manual_seed(0)
    model = Mobile().eval()
    unread_(model, "c", [0, 5, 6, 9])
    unread_(model, "gate", [0, 5])
    images = torch.randn(2, 3, 5, 5)
    result = shrink(model, images)
    small: Any = result.model
    assert result.removed == {"gate": 2, "c": 3}
    assert result.kept == {"c": "gate reads them"}
    assert (small.depth.groups, small.depth.in_channels, small.a.out_channels, small.b.out_channels) == (6, 6, 6, 3)
    assert small.scale.shape == (6, 1, 1)
    assert same(model, small, images)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[4].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (Reused, "b", "its input comes from outside"),
        (Softmaxed, "b", "its input comes through softmax"),
        (tied, "2", "the model returns them"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), "2", "through layer_norm in 1"),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "nn.MultiheadAttention keeps its width"),
    ],
)
def test_layers_that_must_stay_say_why(make: Any, name: str, reason: str) -> None:
    torch.manual_seed(0)
    model = make()
    unread_(model, name, [1])
    x = torch.randn(3, 5, 8)
    result = shrink(model, (x, x, x) if isinstance(model, nn.MultiheadAttention) else x)
    assert result.removed == {}
    assert reason in result.kept[name]
    assert result.after == result.before


def test_hooks_and_norms_over_another_dimension_do_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 8))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    unread_(model, "2", [1])
    result = shrink(model, torch.randn(3, 5, 8))
    assert result.removed == {"2": 1}
    assert same(model, result.model, torch.randn(3, 5, 8))


def test_groups_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    unread_(model, "2", [1])
    assert shrink(model, torch.randn(1, 4, 9, 9)).kept == {"2": "its input comes through conv2d in 0"}


class Attention(nn.Module):
    """Heads in linear layers: apart or fused, by the fused operator or written out."""

    def __init__(self, style: str, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.style, self.num_heads, self.head_dim = style, heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 20), nn.Linear(20, width)

    def heads(self, x: Tensor) -> list[Tensor]:
        if self.style == "fused":
            fused = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
            return list(fused.permute(2, 0, 3, 1, 4).unbind(0))
        parts = self.qkv(x).chunk(3, -1)
        return [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.norm(x))
        if self.style == "written":
            y = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, -1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.width()))
        return x + self.down(nn.functional.gelu(self.up(x)))

    def width(self) -> int:
        return 12 if self.style == "fixed" else self.num_heads * self.head_dim if self.style == "fused" else -1


@pytest.mark.parametrize("style", ["fused", "apart", "written"])
def test_whole_heads_and_hidden_channels_leave(style: str) -> None:
    torch.manual_seed(0)
    model = Attention(style)
    unread_(model, "out", [4, 5, 6, 7, 9])  # the second head, and a channel of the third
    unread_(model, "down", list(range(5, 15)))
    tokens = torch.randn(2, 7, 12)
    result = shrink(model, tokens)
    small: Any = result.model
    assert result.removed == {"out": 4, "down": 10}
    assert result.kept == {"out": "out reads them in part"}
    assert (small.qkv.weight.shape, small.out.weight.shape, small.up.weight.shape) == ((24, 12), (12, 8), (10, 12))
    assert same(model, small, torch.randn(3, 4, 12)), "another batch and length"
    if style == "fused":
        assert small.num_heads == result.sizes[""]["num_heads"] == 2


def test_sizes_written_into_the_code_are_found_out_by_running_it() -> None:
    torch.manual_seed(0)
    model = Attention("fixed")
    unread_(model, "out", [4, 5, 6, 7])
    unread_(model, "down", [3])
    result = shrink(model, torch.randn(2, 7, 12))
    assert result.removed == {"down": 1}, "what can go goes all the same"
    assert "the code of the model has its sizes written in (RuntimeError" in result.kept["out"]
    assert same(model, result.model, torch.randn(2, 7, 12))


def test_encoder_layers_lose_hidden_channels() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    for name in ("layers.0.linear2", "layers.1.linear2"):
        unread_(model, name, [1, 2, 3])
    tokens = torch.randn(2, 5, 8)
    result = shrink(model, tokens)
    assert result.removed == {"layers.0.linear2": 3, "layers.1.linear2": 3}
    assert same(model, result.model, tokens)


def quantized_chain(grid: obc.IntGrid) -> tuple[nn.Module, dict[str, Any], Tensor]:
    model, solutions, samples = solved_chain(grid)
    return copy.deepcopy(model), solutions, samples


@functools.cache
def solved_chain(grid: obc.IntGrid) -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = chain().eval()
    samples = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    prune = obc.Prune(obc.Structured(0.5), exclude=["0.0"])
    quantize = obc.Quantize(grid, activations=obc.ActivationGrid(8), exclude=["0.0"])
    report = obc.compress(model, samples, [prune, quantize])
    return model, dict(report.solutions), samples


GRIDS = {
    "channel": obc.IntGrid(4, symmetric=False),
    "groups": obc.IntGrid(3, granularity="group", group_size=4),
}


@pytest.mark.parametrize("grid", list(GRIDS))
def test_masks_codes_and_input_ranges_are_carried_over(grid: str, tmp_path) -> None:
    model, solutions, samples = quantized_chain(GRIDS[grid])
    large = compressed_state(model, solutions)
    result = shrink(model, IMAGES, solutions)
    small: Any = result.model
    # Scales of 4 columns cost more than the columns that would leave, but where all four do.
    assert set(result.removed) == {"channel": {"1", "5", "9"}, "groups": {"5"}}[grid]
    assert attached(small).keys() == attached(model).keys() != set()
    for name, weight in result.solutions.items():
        layer = small.get_submodule(name)
        assert torch.equal(adapter_for(layer).weight_matrix(layer), weight.dequantize())
    last, before = result.solutions["9"], large["9"]
    read = before.mask[0].any(0)  # no row of the last layer leaves
    if grid == "channel":
        assert torch.equal(last.codes, before.codes[..., read])
        assert torch.equal(last.mask, before.mask[..., read])
        assert torch.equal(last.scale, before.scale)
        assert torch.equal(last.zero_point, before.zero_point)
    else:
        assert int(read.sum()) <= last.mask.shape[-1] <= len(read)
        assert torch.equal(last.dequantize()[last.mask], before.dequantize()[before.mask])
    with unquantized(model), unquantized(small):
        assert same(model, small, samples)
    path = tmp_path / "small.safetensors"
    packed = save_packed(small, result.solutions, path, sizes=result.sizes)
    assert packed.size < save_packed(model, solutions, tmp_path / "large.safetensors").size
    fresh = chain().eval()
    loaded = load_packed(fresh, path)
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in fresh.state_dict().items())
    assert all(
        torch.equal(loaded[name].codes, weight.codes) for name, weight in result.solutions.items() if weight.bits
    )
    with torch.no_grad():
        assert torch.equal(fresh(samples), small.eval()(samples))


def test_ranges_per_channel_lose_the_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(64, 6)
    activations = obc.ActivationGrid(8, granularity="channel")
    obc.compress(model, x, [obc.Quantize(obc.IntGrid(8), layers=["2"], activations=activations)])
    unread_(model, "2", [0, 3])
    small = shrink(model, x).model
    old, new = attached(model)["2"].grid.scale, attached(small)["2"].grid.scale
    assert torch.equal(new, old[:, [1, 2, 4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)


def test_scales_per_group_keep_whole_runs_where_that_is_smaller() -> None:
    """64 scales of 32 columns each lose one column: cutting it would need a scale for every column."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.randn(256, 6)
    grid = obc.IntGrid(4, granularity="group", group_size=32)
    report = obc.compress(model, x, [obc.Quantize(grid, layers=["2"])])
    weight = compressed_state(model, report.solutions)["2"]
    for columns, left, scales in (([0], 64, 2), ([*range(16), *range(32, 48)], 32, 2), (list(range(32)), 32, 1)):
        copied, mask, codes = copy.deepcopy(model), weight.mask.clone(), weight.codes.clone()
        unread_(copied, "2", columns)
        mask[..., columns] = False
        codes[~mask] = weight.expand(weight.zero_point)[~mask].to(torch.uint8)
        pruned = dataclasses.replace(weight, mask=mask, codes=codes)
        result = shrink(copied, x, {"2": pruned})
        assert result.model[2].in_features == left
        assert result.solutions["2"].scale.shape[-1] == scales


def test_a_file_of_a_shrunk_model_is_refused_by_another_model(tmp_path) -> None:
    model = chain().eval()
    unread_(model, "9", [1])
    result = shrink(model, IMAGES)
    path = tmp_path / "small.safetensors"
    save_packed(result.model, {}, path, sizes=result.sizes)
    other = nn.Sequential(*list(chain())[:-1])
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(FingerprintError, match="another model"):
        load_packed(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(FingerprintError, match="Sizes belong to another model"):
        load_packed(nn.Sequential(nn.Linear(2, 2)), path)


def test_onnx_files_of_shrunk_models_hold_the_same_codes(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, solutions, samples = quantized_chain(GRIDS["channel"])
    result = shrink(model, IMAGES, solutions)
    done = export_onnx(result.model, IMAGES, tmp_path / "small.onnx", solutions=result.solutions)
    stored = read_onnx_weights(tmp_path / "small.onnx")
    assert {f"{name}.weight" for name, weight in result.solutions.items() if weight.bits} == set(stored)
    for name, weight in result.solutions.items():
        layer = result.model.get_submodule(name)
        if weight.codes is None:
            continue
        codes = adapter_for(layer).to_module_layout(layer, weight.codes.int()) - 2 ** (weight.bits - 1)
        assert torch.equal(torch.as_tensor(stored[f"{name}.weight"].codes).int(), codes)
    session = open_session(tmp_path / "small.onnx", threads=1)
    (found,) = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
    with torch.no_grad():
        expected = done.reference(samples)
    assert torch.isclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4).float().mean() > 0.95


def test_stale_solutions_are_refused() -> None:
    model, solutions, _ = quantized_chain(GRIDS["channel"])
    with torch.no_grad():
        model.get_submodule("9").weight.mul_(1.5)
    with pytest.raises(ExportError, match="not the compressed ones"):
        shrink(model, IMAGES, solutions)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="cannot be traced"):
        shrink(Branching(), torch.ones(2))
    with pytest.raises(ExportError, match="cannot be traced"):
        shrink(nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 4))


def test_a_copy_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at the end, with a mistake put in: a softmax that is taken for an activation."""
    from lightning_obc.export import channel_rules, channel_tracker

    monkeypatch.setitem(channel_tracker.RULES, "softmax", channel_rules._same)
    model = Softmaxed()
    unread_(model, "b", [1])
    with pytest.raises(ExportError, match="computes something else"):
        shrink(model, torch.randn(3, 8))
