"""ONNX files: our integers bit for bit, the same outputs, and named errors."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_models import compress_, residual_net
from torch import nn

from lightning_obc import files as files_module
from lightning_obc.errors import ExportError, LayerNotFoundError, MissingExtraError, SpecError
from lightning_obc.export import export_onnx, open_session, read_onnx_weights, small_types
from lightning_obc.export.ops import StoredCodes, compact_scales, spread
from lightning_obc.export.ranges import ActivationRange, as_range
from lightning_obc.export.saturation import may_saturate
from lightning_obc.export.small_types import stored_bits
from lightning_obc.grids import Grid
from lightning_obc.specs import IntGrid

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

GRIDS = [
    IntGrid(8, symmetric=True),
    IntGrid(8),
    IntGrid(4),
    IntGrid(4, symmetric=True, granularity="tensor"),
    IntGrid(3, granularity="group", group_size=4),
    IntGrid(2, symmetric=True),
    IntGrid(1),
]


def run(path: Path, *inputs: torch.Tensor, optimised: bool = True) -> torch.Tensor:
    if optimised:
        session = open_session(path, threads=1)
    else:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def exported(request, tmp_path_factory):
    """A network on a grid, half of its weights pruned, its compressed weights and its file."""
    net = residual_net()
    state = compress_(net, request.param, pattern=0.5)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(net, torch.randn(2, 1, 8, 8), path, solutions=state)
    return net, state, path


def test_codes_scales_and_zero_points_are_stored_bit_for_bit(exported):
    net, state, path = exported
    stored = read_onnx_weights(path)
    assert stored.keys() == {f"{name}.weight" for name in state}
    for name, weight in state.items():
        module, found = net.get_submodule(name), stored[f"{name}.weight"]
        middle = 2 ** (weight.bits - 1)
        assert found.bits == stored_bits(weight.bits)
        assert found.codes.shape == module.weight.shape

        def matrix(tensor, shape=weight.codes.shape):
            return (tensor.movedim(1, -1) if tensor.dim() == 4 else tensor).reshape(shape)

        codes = matrix(found.codes).to(torch.int16) + middle
        assert torch.equal(codes, weight.codes.to(torch.int16))
        full = [spread(part, found.codes.shape, found.axis, found.block) for part in (found.scale, found.zero_point)]
        scale, zero = (matrix(part.expand(found.codes.shape)) for part in full)
        assert torch.equal(scale, weight.expand(weight.scale))
        assert torch.equal(zero.float() + middle, weight.expand(weight.zero_point))


@pytest.mark.parametrize("optimised", [False, True])
def test_quantized_weights_give_the_output_of_the_compressed_model(exported, optimised):
    net, _, path = exported
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(run(path, images, optimised=optimised), net(images).detach(), rtol=1e-4, atol=1e-5)


def test_small_codes_take_half_or_a_quarter_of_a_byte(tmp_path):
    sizes = {}
    for bits in (2, 4, 8):
        net = nn.Sequential(nn.Conv2d(32, 64, 3))
        state = compress_(net, IntGrid(bits, symmetric=True))
        export_onnx(net, torch.randn(1, 32, 4, 4), tmp_path / f"{bits}.onnx", solutions=state)
        sizes[bits] = (tmp_path / f"{bits}.onnx").stat().st_size
    weights = sum(weight.codes.numel() for weight in state.values())
    assert abs(sizes[8] - sizes[4] - weights / 2) < 0.05 * weights
    assert abs(sizes[8] - sizes[2] - weights * (8 - stored_bits(2)) / 8) < 0.05 * weights


def test_two_bit_types_are_used_where_the_runtime_runs_them_only(tmp_path, monkeypatch):
    net = residual_net()
    state = compress_(net, IntGrid(2))
    images = torch.randn(2, 1, 8, 8)
    for runs, width, opset in ((True, 2, 25), (False, 4, 21)):
        if runs and not small_types.runs_int2():
            continue
        monkeypatch.setattr(small_types, "runs_int2", lambda runs=runs: runs)
        path = tmp_path / f"{width}.onnx"
        export_onnx(net, images, path, solutions=state)
        assert {weight.bits for weight in read_onnx_weights(path).values()} == {width}
        assert [entry.version for entry in onnx.load(str(path)).opset_import] == [opset]
        torch.testing.assert_close(run(path, images), net(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [IntGrid(8, symmetric=True), IntGrid(8), IntGrid(4)], ids=str)
def test_quantized_inputs_of_layers_agree_within_one_step_of_each_layer(grid, tmp_path):
    """One layer at a time, because a difference of one step is amplified by the layers after it."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    state = compress_(layer, grid)
    images = torch.randn(3, 4, 9, 9)
    limits = ActivationRange.between(float(images.min()), float(images.max()))
    path = tmp_path / "layer.onnx"
    export = export_onnx(layer, images, path, solutions=state, activations={"0": (limits.scale, limits.zero_point)})
    expected = layer(torch.fake_quantize_per_tensor_affine(images, limits.scale, limits.zero_point, 0, 255)).detach()
    torch.testing.assert_close(export.reference(images).detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(path, images), expected, rtol=1e-4, atol=1e-4)
    assert operators(path).count("QuantizeLinear") == 1


@pytest.mark.parametrize("grid", [IntGrid(8, symmetric=True), IntGrid(8), IntGrid(4)], ids=str)
def test_integer_convolutions_agree_within_one_step_of_their_output(grid, tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8))
    state = compress_(net, grid)
    images = torch.randn(6, 4, 9, 9)
    path = tmp_path / "net.onnx"
    export = export_onnx(net, images, path, solutions=state, calibration=[images], activation_bits=7)
    # Every output is one inner value times one weight, so that steps of the inner tensor can be counted.
    step = export.activations["relu"].scale * net[2].weight.detach().abs().reshape(1, 8, 1, 1)
    steps = (run(path, images) - export.reference(images).detach()).abs() / step.clamp_min(1e-9)
    assert float(steps.max()) <= 1.001
    # Integer kernels round the bias to a multiple of both scales, which moves some values over a rounding boundary.
    assert float((steps > 0.5).float().mean()) < 0.05


def test_batch_norms_fold_into_scales_and_keep_the_codes(tmp_path):
    net = residual_net()
    state = compress_(net, IntGrid(4))
    images = torch.randn(4, 1, 8, 8)
    folded = export_onnx(net, images, tmp_path / "a.onnx", solutions=state, fold_batch_norm=True)
    assert set(folded.folded) == {"norm0", "norm1", "norm2"}
    assert "BatchNormalization" not in operators(tmp_path / "a.onnx")
    torch.testing.assert_close(run(tmp_path / "a.onnx", images), net(images).detach(), rtol=1e-4, atol=1e-5)
    stored = read_onnx_weights(tmp_path / "a.onnx")["conv1.weight"]
    codes = stored.codes.movedim(1, -1).reshape(state["conv1"].codes.shape)
    assert torch.equal(codes + 8, state["conv1"].codes.to(torch.int8))
    factor = net.norm1.weight * (net.norm1.running_var + net.norm1.eps).rsqrt()
    torch.testing.assert_close(stored.scale, (state["conv1"].scale.flatten() * factor).detach(), rtol=1e-6, atol=0)


def test_a_norm_with_a_zero_factor_stays(tmp_path):
    net = residual_net()
    with torch.no_grad():
        net.norm1.weight[2] = 0
    state = compress_(net, IntGrid(8, symmetric=True))
    images = torch.randn(4, 1, 8, 8)
    export = export_onnx(net, images, tmp_path / "a.onnx", solutions=state, calibration=[images])
    assert "norm1" not in export.folded
    assert torch.isfinite(run(tmp_path / "a.onnx", images)).all()


def test_every_tensor_between_quantized_layers_is_quantized_once(tmp_path):
    net = residual_net()
    state = compress_(net, IntGrid(8, symmetric=True))
    images = torch.randn(64, 1, 8, 8)
    export = export_onnx(net, images, tmp_path / "a.onnx", solutions=state, calibration=images.split(32))
    kinds = operators(tmp_path / "a.onnx")
    # Image, stem, pooling, conv1, conv2 and the head's input; the addition leaves the integer path into a mean.
    assert kinds.count("QuantizeLinear") == len(export.activations)
    assert len(export.activations) >= 5
    assert export.activations["max_pool2d"] == export.activations["relu"]
    assert export.activations["relu"].zero_point == 0
    reference = export.reference(images).detach()
    output = run(tmp_path / "a.onnx", images)
    assert float((output.argmax(1) == reference.argmax(1)).float().mean()) >= 0.95
    dense = net(images).detach()
    assert float((output - dense).pow(2).mean() / dense.pow(2).mean()) < 0.01


def test_batch_size_is_open_and_the_model_is_untouched(tmp_path):
    net = residual_net().train()
    state = compress_(net, IntGrid(4))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export_onnx(net, torch.randn(1, 1, 8, 8), tmp_path / "a.onnx", solutions=state, fold_batch_norm=True)
    assert net.training
    assert net.conv1.training
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for batch in (1, 7):
        assert run(tmp_path / "a.onnx", torch.randn(batch, 1, 8, 8)).shape == (batch, 10)


def test_a_fixed_batch_and_floating_point(tmp_path):
    net = residual_net()
    images = torch.randn(1, 1, 8, 8)
    export = export_onnx(net, images, tmp_path / "a.onnx", dynamic_batch=False)
    torch.testing.assert_close(run(tmp_path / "a.onnx", images), net(images).detach(), rtol=1e-4, atol=1e-5)
    assert not export.weights
    assert "DequantizeLinear" not in operators(tmp_path / "a.onnx")


class Attention(nn.Module):
    """Attention, a transposed convolution and a tied projection: layouts that are not a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 16, 2, stride=2, groups=2)
        self.first = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.first.weight
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        x = self.norm(self.first(mixed) + self.tied(tokens))
        return self.up(x.transpose(1, 2))


@pytest.mark.parametrize("quantized", [False, True])
def test_attention_transposed_convolutions_and_tied_weights(quantized, tmp_path):
    torch.manual_seed(0)
    model = Attention().eval()
    state = compress_(model, IntGrid(8, symmetric=True))
    tokens = torch.randn(3, 5, 16)
    path = tmp_path / "a.onnx"
    export = export_onnx(model, tokens, path, solutions=state, calibration=[tokens] if quantized else None)
    assert not export.notes or quantized
    torch.testing.assert_close(
        run(path, tokens), export.reference(tokens).detach(), rtol=1e-2, atol=0.02 if quantized else 1e-5
    )
    stored = set(read_onnx_weights(path))
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "up.weight"} <= stored
    assert stored & {"first.weight", "tied.weight"}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(8, 6, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        warnings.warn("of the model's own")
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_export_without_warnings_about_pytorchs_own_code(kind, tmp_path):
    torch.manual_seed(0)
    model, x = Recurrent(kind).eval(), torch.randn(4, 5, 8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        export_onnx(model, x, tmp_path / "a.onnx")
    texts = [str(warning.message) for warning in seen]
    assert not [text for text in texts if "_flat_weights" in text or "_check_is_size" in text]
    assert "of the model's own" in texts
    torch.testing.assert_close(run(tmp_path / "a.onnx", x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_ranges_of_other_widths_clip_where_they_end(tmp_path):
    layer = nn.Sequential(nn.Linear(8, 4))
    state = compress_(layer, IntGrid(4))
    x = 3 * torch.randn(32, 8)
    grid = Grid(IntGrid(4), torch.tensor([[[0.25]]]), torch.tensor([[[6.0]]]))
    export = export_onnx(layer, x, tmp_path / "a.onnx", solutions=state, activations={"0": grid})
    expected = layer(torch.fake_quantize_per_tensor_affine(x, 0.25, 6, 0, 15)).detach()
    torch.testing.assert_close(export.reference(x).detach(), expected)
    torch.testing.assert_close(run(tmp_path / "a.onnx", x), expected, rtol=1e-4, atol=1e-5)


def test_accuracy_on_digits_is_that_of_the_fake_quantized_model(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    labels = torch.tensor(digits.target)
    net = residual_net(width=16).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(6):
        for index in torch.randperm(1500).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
    net.eval()
    state = compress_(net, IntGrid(6))
    path = tmp_path / "digits.onnx"
    weights_only = export_onnx(net, images[:2], path, solutions=state)
    test = images[1500:]

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits.argmax(1) == labels[1500:]).float().mean())

    compressed = accuracy(net(test).detach())
    assert compressed > 0.85
    assert accuracy(run(weights_only.path, test)) == compressed
    export = export_onnx(net, images[:2], path, solutions=state, calibration=images[:512].split(64), overwrite=True)
    reference = accuracy(export.reference(test).detach())
    # Two images of 297 may change sides at a rounding boundary.
    assert abs(accuracy(run(path, test)) - reference) <= 2 / 297 + 1e-6
    assert abs(reference - compressed) <= 0.02


def test_an_existing_file_is_refused_and_a_failure_leaves_it_alone(tmp_path, monkeypatch):
    net = residual_net()
    path = tmp_path / "a.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"exists already.*overwrite=True"):
        export_onnx(net, torch.randn(1, 1, 8, 8), path)

    def full_disk(program: object, part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_obc.export.onnx_export._save", full_disk)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(net, torch.randn(1, 1, 8, 8), path, overwrite=True)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j1(x)


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize("model", [Unsupported(), DataDependent()], ids=["operator", "control flow"])
def test_what_cannot_be_exported_is_a_named_error(model, tmp_path):
    with pytest.raises(ExportError, match=r"cannot be (translated|traced)"):
        export_onnx(model, torch.randn(2, 3), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_moved_since_are_refused(tmp_path):
    net = residual_net()
    state = compress_(net, IntGrid(4))
    with torch.no_grad():
        net.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(ExportError, match="conv1: 1 of"):
        export_onnx(net, torch.randn(1, 1, 8, 8), tmp_path / "a.onnx", solutions=state)
    with pytest.raises(LayerNotFoundError, match="conv9"):
        export_onnx(net, torch.randn(1, 1, 8, 8), tmp_path / "a.onnx", solutions={"conv9": state["conv1"]})


def test_ranges_of_layers_that_are_not_quantized_are_refused(tmp_path):
    net = residual_net()
    state = compress_(net, IntGrid(4), layers=["conv1"])
    with pytest.raises(ExportError, match="Got: head"):
        export_onnx(net, torch.randn(2, 1, 8, 8), tmp_path / "a.onnx", solutions=state, activations={"head": (0.1, 3)})
    with pytest.raises(SpecError, match="positive scale"):
        as_range("conv1", (0.0, 3))
    with pytest.raises(ExportError, match="per tensor"):
        as_range("conv1", (torch.ones(4), torch.zeros(4)))


def test_saturation_is_warned_of_and_seven_bits_avoid_it(tmp_path, caplog):
    net = residual_net()
    state = compress_(net, IntGrid(8, symmetric=True))
    images = torch.randn(8, 1, 8, 8)
    with caplog.at_level(logging.WARNING):
        export = export_onnx(net, images, tmp_path / "8.onnx", solutions=state, calibration=[images])
    assert any("activation_bits=7" in note for note in export.notes)
    assert "VNNI" in caplog.text
    seven = export_onnx(net, images, tmp_path / "7.onnx", solutions=state, calibration=[images], activation_bits=7)
    assert not seven.notes
    for name, limits in seven.activations.items():
        assert limits.scale == pytest.approx(export.activations[name].scale * 255 / 127, rel=1e-6)
        assert limits.zero_point <= 127
    small = StoredCodes(torch.full((2, 3), 7, dtype=torch.int8), torch.ones(()), torch.zeros(()), 0, 0, 4)
    assert not may_saturate(small)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(files_module, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"lightning-obc\[onnx\]"):
        export_onnx(residual_net(), torch.randn(1, 1, 8, 8), tmp_path / "a.onnx")


@pytest.mark.parametrize("shape", [(6, 4, 3), (4, 6)])
@pytest.mark.parametrize("kind", ["one", "axis0", "axis1", "blocks", "full"])
def test_compact_scales_spread_back(shape, kind):
    rng = np.random.default_rng(0)
    full = {
        "one": np.full(shape, 0.5),
        "axis0": np.broadcast_to(rng.random((shape[0], *[1] * (len(shape) - 1))), shape),
        "axis1": np.broadcast_to(rng.random((1, shape[1], *[1] * (len(shape) - 2))), shape),
        "blocks": rng.random((shape[0], shape[1] // 2, *shape[2:])).repeat(2, 1),
        "full": rng.random(shape),
    }[kind]
    scale = torch.tensor(full.copy())
    zero = torch.round(scale * 10)
    small, small_zero, axis, block = compact_scales(scale, zero)
    assert torch.equal(spread(small, scale.shape, axis, block).expand(shape), scale)
    assert torch.equal(spread(small_zero, scale.shape, axis, block).expand(shape), zero)
    assert small.numel() == {"one": 1, "axis0": shape[0], "axis1": shape[1]}.get(
        kind, scale.numel() // (2 if kind == "blocks" else 1)
    )
