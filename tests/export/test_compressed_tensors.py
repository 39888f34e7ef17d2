"""The layout of compressed-tensors: read back by a plain reader, and by the package where it is installed."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_models import compress_
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_obc.activation_spec import ActivationGrid
from lightning_obc.activations import InputGrid, attach, detach
from lightning_obc.errors import ExportError
from lightning_obc.export.compressed_tensors import pack_linear, save_compressed_tensors
from lightning_obc.grids import Grid
from lightning_obc.specs import IntGrid

GRIDS = [IntGrid(4), IntGrid(4, symmetric=True), IntGrid(3), IntGrid(8, symmetric=True)]
GROUPED = IntGrid(4, granularity="group", group_size=10)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes of every row, one Python integer at a time."""
    rows = []
    for words in packed.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        rows.append([(stream >> (bits * index)) & (2**bits - 1) for index in range(columns)])
    return torch.tensor(rows)


@pytest.mark.parametrize("grid", [*GRIDS, GROUPED], ids=str)
def test_codes_and_zero_points_read_back(grid):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 5))
    (weight,) = compress_(model, grid).values()
    tensors = pack_linear(weight)
    assert torch.equal(unpack_rows(tensors["weight_packed"], grid.bits, 70), weight.codes[0].long())
    assert tensors["weight_packed"].shape == (5, -(-70 * grid.bits // 32))
    assert ("weight_zero_point" in tensors) == (not grid.symmetric)
    if not grid.symmetric:
        zero = unpack_rows(tensors["weight_zero_point"].T, grid.bits, 5).T
        assert torch.equal(zero, weight.zero_point[0].long())


@pytest.mark.parametrize("grid", [*GRIDS, GROUPED], ids=str)
def test_the_package_decompresses_to_our_weights(grid):
    package = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 5))
    (weight,) = compress_(model, grid).values()
    grouped = grid.granularity == "group"
    scheme = package.QuantizationScheme(
        targets=["Linear"],
        weights=package.QuantizationArgs(
            num_bits=grid.bits,
            symmetric=grid.symmetric,
            strategy="group" if grouped else "channel",
            group_size=grid.group_size,
        ),
    )
    found = compressors.PackedQuantizationCompressor.decompress(pack_linear(weight), scheme)["weight"]
    torch.testing.assert_close(found, model[0].weight.detach(), rtol=0, atol=0)


def test_files_hold_the_rest_of_the_model_and_a_config_that_the_package_accepts(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 3))
    state = compress_(model, IntGrid(4), layers=["0", "2"])
    left = save_compressed_tensors(model, state, tmp_path)
    assert left == {"0": "Conv1d, not a linear layer"}
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["0.weight"], model[0].weight)
    assert {"2.weight_packed", "2.weight_scale", "2.weight_shape", "2.weight_zero_point", "2.bias"} <= set(tensors)
    assert "2.weight" not in tensors
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["2"]
    assert config["ignore"] == ["3"]
    package = pytest.importorskip("compressed_tensors.quantization")
    parsed = package.QuantizationConfig.model_validate(config)
    assert parsed.config_groups["group_0"].weights.num_bits == 4


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_package_loads_8_bit_weights_behind_quantized_inputs(symmetric, tmp_path):
    """Its own way to load a model, config and tensors: the same weights, and outputs of integers in and out."""
    package = pytest.importorskip("compressed_tensors.quantization")
    pytest.importorskip("transformers")
    from compressed_tensors.compressors import ModelCompressor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))
    grid = IntGrid(8, symmetric=symmetric)
    state = compress_(model, grid, layers=["0"]) | compress_(model, IntGrid(4), layers=["2"])
    state |= compress_(model, grid, layers=["4"])
    attach(model, {name: input_grid(symmetric) for name in ("0", "2")})
    assert save_compressed_tensors(model, state, tmp_path) == {}
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["0.weight"].dtype == torch.int8
    assert {"2.weight_packed", "4.weight_packed", "2.input_scale"} <= set(tensors)
    assert "4.input_scale" not in tensors

    config = package.QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    assert config.format == "mixed-precision"
    other = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))
    package.apply_quantization_config(other, config)
    loader = ModelCompressor(quantization_config=config)
    loader.compress_model(other)
    other.load_state_dict(tensors)
    loader.decompress_model(other)
    for name in state:
        assert torch.equal(other.get_submodule(name).weight, model.get_submodule(name).weight), name
    for layer in other:
        # The package would round the weights once more, which are on their grid already.
        layer.quantization_status = package.QuantizationStatus.COMPRESSED
    x = torch.randn(64, 70)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    detach(model)
    assert not torch.allclose(other(x), model(x), rtol=1e-3, atol=1e-3)


def input_grid(symmetric: bool, channels: int = 1) -> InputGrid:
    spec = ActivationGrid(8, symmetric=symmetric)
    zero = torch.full((1, channels, 1), 128.0 if symmetric else 101.0)
    axis = None if channels == 1 else 1
    return InputGrid(spec, Grid(IntGrid(8, symmetric=symmetric), torch.full((1, channels, 1), 0.03), zero), axis)


def test_ranges_of_inputs_per_channel_are_left_out_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    state = compress_(model, IntGrid(8))
    attach(model, {"0": input_grid(False, channels=4)})
    assert "range per channel" in save_compressed_tensors(model, state, tmp_path)["0"]
    assert not any("input" in key for key in load_file(tmp_path / "model.safetensors"))


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    state = compress_(model, IntGrid(4), layers=["0"]) | compress_(model, None, 0.5, layers=["1"])
    with pytest.raises(ExportError, match="1: not quantized"):
        save_compressed_tensors(model, state, tmp_path)
    assert not list(tmp_path.iterdir())
