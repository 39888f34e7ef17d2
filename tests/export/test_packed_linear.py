"""Linear layers that ONNX Runtime computes from packed codes: our integers, our scales, and the runtime's rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_models import compress_
from torch import Tensor, nn

from lightning_obc.errors import ExportError
from lightning_obc.export import CompressedWeight, OnnxExport, export_onnx, open_session, read_onnx_weights
from lightning_obc.export.ops import spread
from lightning_obc.export.packed_linear import rounded_inputs
from lightning_obc.specs import IntGrid

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

KERNELS = ("packed", "packed-int8")
GRIDS = [
    IntGrid(4),
    IntGrid(4, symmetric=True, granularity="tensor"),
    IntGrid(3, granularity="group", group_size=32),
    IntGrid(1),
    IntGrid(8),
]


def mlp() -> nn.Sequential:
    """Widths that fill whole runs of columns, and one (100) that does not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 100, bias=False), nn.ReLU(), nn.Linear(100, 10))


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = open_session(path, threads=1)
    feed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def decoded(path: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Codes, zero points and scales ``[N, K]`` of every ``MatMulNBits``, by the operator's description alone."""
    graph = onnx.load(str(path)).graph
    stored = {proto.name: onnx.numpy_helper.to_array(proto) for proto in graph.initializer}

    def entry(row: np.ndarray, index: int, bits: int) -> int:
        return int(row[index * bits // 8]) >> (index * bits % 8) & (2**bits - 1)

    found = []
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        has = {attribute.name: attribute.i for attribute in node.attribute}
        packed, scale, zero = (stored[name] for name in node.input[1:4])
        rows, columns, block, bits = (has[name] for name in ("N", "K", "block_size", "bits"))
        assert packed.shape == (rows, -(-columns // block), block * bits // 8)
        of = [
            [
                (
                    entry(packed[row, column // block], column % block, bits),
                    entry(zero[row], column // block, bits),
                    scale[row, column // block],
                )
                for column in range(columns)
            ]
            for row in range(rows)
        ]
        codes, zeros, scales = np.moveaxis(np.array(of), -1, 0)
        found.append((codes.astype(np.int64), zeros.astype(np.int64), scales.astype(np.float32)))
    return found


@dataclass(frozen=True)
class Case:
    net: nn.Sequential
    state: dict[str, CompressedWeight]
    kernel: str
    path: Path
    done: OnnxExport


@pytest.fixture(scope="module", params=[(grid, kernel) for grid in GRIDS for kernel in KERNELS], ids=str)
def case(request, tmp_path_factory):
    """A network on a grid, some of its weights pruned, and its file."""
    grid, kernel = request.param
    net, path = mlp(), tmp_path_factory.mktemp("packed") / "net.onnx"
    state = compress_(net, grid, pattern=0.3)
    return Case(net, state, kernel, path, export_onnx(net, torch.randn(2, 96), path, solutions=state, linear=kernel))


def test_codes_scales_and_zero_points_are_stored_bit_for_bit(case):
    left = {note.partition(".weight")[0] for note in case.done.notes}
    packed = [weight for name, weight in case.state.items() if name not in left]
    assert left == {name for name, weight in case.state.items() if case.kernel == "packed" and weight.bits > 4}
    found = decoded(case.path)
    assert len(found) == len(packed) == nodes(case.path).count("MatMulNBits")
    for (codes, zeros, scales), weight in zip(found, packed, strict=True):
        assert np.array_equal(codes, weight.codes[0].numpy())
        assert np.array_equal(zeros, weight.expand(weight.zero_point)[0].numpy())
        assert np.array_equal(scales, weight.expand(weight.scale)[0].float().numpy())


def test_the_reader_gives_the_weights_of_the_model(case):
    stored = read_onnx_weights(case.path)
    assert stored.keys() == {"0.weight", "2.weight", "4.weight"}
    for name, entry in stored.items():
        shape = entry.codes.shape
        zero, scale = (spread(part, shape, entry.axis, entry.block) for part in (entry.zero_point, entry.scale))
        assert torch.equal((entry.codes.float() - zero.float()) * scale + 0.0, case.net.get_parameter(name))


def test_outputs_are_those_of_the_compressed_model(case):
    inputs = torch.randn(17, 96)
    with torch.no_grad():
        dense, reference, got = case.net(inputs), case.done.reference(inputs), run(case.path, inputs)
    if case.kernel == "packed":
        torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reference, dense, rtol=1e-5, atol=1e-6)
    else:
        # The reference knows the runtime's rounding; a value on a boundary may still fall to the other side.
        assert float((got - reference).square().mean()) <= 0.01 * float((got - dense).square().mean())


@pytest.mark.parametrize("grid", [IntGrid(4), IntGrid(8)], ids=str)
def test_integer_kernels_round_inputs_as_the_reference_does(grid, tmp_path):
    torch.manual_seed(1)
    net, path, sample = nn.Sequential(nn.Linear(96, 33)), tmp_path / "net.onnx", torch.randn(40, 96)
    sample[0, :64] = 0.0  # A run without a largest magnitude.
    done = export_onnx(net, sample, path, solutions=compress_(net, grid), linear="packed-int8")
    assert nodes(path) == ["MatMulNBits"], done.notes
    for inputs in (sample[:1], sample[:5], sample):
        with torch.no_grad():
            got, dense = run(path, inputs), net(inputs)
            torch.testing.assert_close(got, done.reference(inputs), rtol=1e-5, atol=2e-6)
        # At most half a step of a run for every input, and no run's step is larger than that of the whole row.
        step = inputs.abs().amax(1, keepdim=True) / 127
        bound = step / 2 * net[0].weight.abs().sum(1) * (1 + 1e-4) + 1e-6
        assert bool(((got - dense).abs() <= bound).all())
        assert float((got - dense).abs().max()) > 1e-5


def test_inputs_are_rounded_per_run_with_the_largest_at_127():
    x = torch.tensor([[0.0, 1.27, -0.634, 0.0, 0.0, 0.0, 25.4, 0.09]])
    rounded = rounded_inputs(x, 4)
    torch.testing.assert_close(rounded, torch.tensor([[0.0, 1.27, -0.63, 0.0, 0.0, 0.0, 25.4, 0.0]]))
    assert torch.equal(rounded_inputs(x[:, :3], 4), rounded[:, :3])


@pytest.mark.parametrize(
    ("grid", "kernel", "reason"),
    [
        (IntGrid(4, granularity="group", group_size=8), "packed", "fewer than 16 columns"),
        (IntGrid(4, granularity="group", group_size=24), "packed-int8", "fewer than 16 columns"),
        (IntGrid(6), "packed", "no fast kernel for 6 bits"),
    ],
    ids=str,
)
def test_what_the_operator_cannot_take_is_left_and_named(grid, kernel, reason, tmp_path):
    net, path, inputs = mlp(), tmp_path / "net.onnx", torch.randn(4, 96)
    state = compress_(net, grid, layers=["0"])
    done = export_onnx(net, inputs, path, solutions=state, linear=kernel)
    assert [reason in note for note in done.notes] == [True]
    assert done.notes[0].startswith("0.weight: ")
    assert "MatMulNBits" not in nodes(path)
    with torch.no_grad():
        torch.testing.assert_close(run(path, inputs), net(inputs), rtol=1e-5, atol=1e-6)


def test_two_bits_need_no_opset_of_their_own_when_all_of_them_are_packed(tmp_path):
    net, path = mlp(), tmp_path / "net.onnx"
    export_onnx(net, torch.randn(2, 96), path, solutions=compress_(net, IntGrid(2)), linear="packed")
    versions = {entry.domain: entry.version for entry in onnx.load(str(path)).opset_import}
    assert versions == {"": 21, "com.microsoft": 1}


class Tied(nn.Module):
    """An embedding and an output layer of one weight, and an attention block between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_blocks_and_tied_weights(kernel, tmp_path):
    torch.manual_seed(0)
    net, path = Tied().eval(), tmp_path / "net.onnx"
    state = compress_(net, IntGrid(4), layers=["block.linear*", "block.self_attn.*", "head"])
    tokens = torch.randint(0, 50, (3, 7))
    done = export_onnx(net, tokens, path, solutions=state, linear=kernel)
    assert nodes(path).count("MatMulNBits") >= 3
    # The table of the embedding is read by rows, from codes of its own.
    assert "Gather" in nodes(path)
    with torch.no_grad():
        dense, reference, got = net(tokens), done.reference(tokens), run(path, tokens)
    if kernel == "packed":
        torch.testing.assert_close(got, dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
    else:
        # Attention carries one input on a rounding boundary to all positions of its sequence: most are none such.
        assert float((got - reference).abs().median()) <= 1e-6 * float(dense.abs().max())
        assert float((got - dense).abs().max()) <= 0.02 * float(dense.abs().max())
    assert run(path, tokens[:1]).shape == (1, 7, 50)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(x)))


@pytest.mark.parametrize("kernel", ["dequantize", "packed"])
def test_a_weight_that_is_used_twice_is_stored_once(kernel, tmp_path):
    torch.manual_seed(0)
    net, path, inputs = Twice(), tmp_path / "net.onnx", torch.randn(3, 256)
    export_onnx(net, inputs, path, solutions=compress_(net, IntGrid(4)), linear=kernel)
    assert path.stat().st_size < 1.2 * 256 * 128 + 256 * (4 + 4 + 4) + 4096
    with torch.no_grad():
        torch.testing.assert_close(run(path, inputs), net(inputs), rtol=1e-5, atol=1e-5)


def test_packed_files_are_as_small_as_their_codes(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    state = compress_(net, IntGrid(4))
    export_onnx(net, torch.randn(2, 512), tmp_path / "packed.onnx", solutions=state, linear="packed")
    # Per 128 codes: 64 bytes, a scale of 4 and half a byte of zero point; the biases, and 4 KiB of graph.
    assert (tmp_path / "packed.onnx").stat().st_size <= 2 * 512 * (4 * (64 + 4 + 0.5) + 4) + 4096


def test_bad_options_are_refused_before_anything_is_written(tmp_path):
    net, path = mlp(), tmp_path / "net.onnx"
    state = compress_(net, IntGrid(4))
    with pytest.raises(ExportError, match="dequantize, packed, packed-int8"):
        export_onnx(net, torch.randn(2, 96), path, solutions=state, linear="int4")
    with pytest.raises(ExportError, match="leaves the ranges out"):
        export_onnx(net, torch.randn(2, 96), path, solutions=state, linear="packed", activations={"0": (0.1, 128)})
    with pytest.raises(ExportError, match="packed-int8 rounds"):
        export_onnx(net, torch.randn(2, 96), path, solutions=state, linear="packed", calibration=[torch.randn(2, 96)])
    assert not path.exists()
