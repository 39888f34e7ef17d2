"""Packed files: bit for bit, near the information-theoretic size, and refused by name when something is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_models import compress_, residual_net
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lightning_obc.errors import ExportError, FingerprintError, LayerNotFoundError, ShapeError
from lightning_obc.export import CompressedWeight, load_packed, read_packed, save_packed
from lightning_obc.export import bits as bits_module
from lightning_obc.export.masks import decode_mask, encode_mask
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.specs import IntGrid

RECIPES = [
    (None, 0.0),
    (None, 0.7),
    (None, "2:4"),
    (IntGrid(4), None),
    (IntGrid(3), 0.9),
    (IntGrid(8, symmetric=True), "2:4"),
    (IntGrid(5, granularity="group", group_size=4), 0.5),
    (IntGrid(2, granularity="tensor"), None),
]


@pytest.mark.parametrize(("grid", "pattern"), RECIPES, ids=str)
def test_a_round_trip_keeps_every_bit(grid, pattern, tmp_path):
    net = residual_net(seed=1, width=16)
    state = compress_(net, grid, pattern)
    path = tmp_path / "net.safetensors"
    save_packed(net, state, path)
    other = residual_net(seed=2, width=16)
    loaded = load_packed(other, path)
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    for name, weight in state.items():
        for part in ("mask", "codes", "scale", "zero_point"):
            expected, found = getattr(weight, part), getattr(loaded[name], part)
            assert (expected is None and found is None) or torch.equal(expected, found), (name, part)
        assert (loaded[name].bits, loaded[name].symmetric) == (weight.bits, weight.symmetric)
    again = save_packed(other, loaded, tmp_path / "again.safetensors")
    assert again.size == path.stat().st_size


def information(weight: CompressedWeight, mask_bits: float) -> float:
    """Bits that a compressed weight cannot do without: mask, codes or values of kept weights, and its grid."""
    kept = int(weight.mask.sum())
    if weight.codes is None:
        return mask_bits + 32 * kept
    zero_points = 0 if weight.symmetric else weight.bits * weight.scale.numel()
    return mask_bits + weight.bits * kept + 32 * weight.scale.numel() + zero_points


def choices(total: int, kept: int) -> float:
    """Bits that say which entries are kept, when their number is known: log2 of the binomial coefficient."""
    return (math.lgamma(total + 1) - math.lgamma(kept + 1) - math.lgamma(total - kept + 1)) / math.log(2)


def drawn(total: int, sparsity: float) -> torch.Tensor:
    return torch.randperm(total) >= round(total * sparsity)


def made(pattern: str, rows: int, columns: int) -> tuple[torch.Tensor, float]:
    """A random mask ``[1, rows, columns]`` of a pattern, and how many bits it holds."""
    kind, _, share = pattern.partition(" ")
    if ":" in kind:
        n, m = map(int, kind.split(":"))
        ranks = torch.rand(rows * columns // m, m).argsort(-1).argsort(-1)
        return (ranks < n).view(1, rows, columns), rows * columns / m * math.log2(math.comb(m, n))
    if kind == "columns":
        mask = drawn(columns, float(share)).expand(1, rows, columns).contiguous()
        return mask, choices(columns, int(mask[0, 0].sum()))
    size = {"dense": 1, "zeros": 1, "blocks": 4}[kind]
    mask = drawn(rows * columns // size, float(share or 0))
    return mask.repeat_interleave(size).view(1, rows, columns), choices(len(mask), int(mask.sum()))


def compressed_to(pattern: str, grid: IntGrid | None, shapes: list[tuple[int, int]]) -> tuple[nn.Module, dict, float]:
    """Linear layers with random weights of a pattern on a grid, and the bytes that they cannot do without."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes))
    state, bits = {}, 0.0
    for name, layer in model.named_children():
        mask, mask_bits = made(pattern, *layer.weight.shape)
        weight, fitted = layer.weight.detach()[None] * mask + 0.0, None
        if grid is not None:
            fitted = fit_grid(weight, grid, channels=layer.in_features)
            weight = fitted.quantize(weight)
        with torch.no_grad():
            layer.weight.copy_(weight[0])
        state[name] = CompressedWeight.from_weight(weight, mask, fitted)
        bits += information(state[name], mask_bits)
    return model, state, bits / 8


GRIDS = {
    "float": None,
    "1 bit": IntGrid(1),
    "2 bits": IntGrid(2),
    "3 bits": IntGrid(3),
    "3 bits in groups": IntGrid(3, granularity="group", group_size=16),
    "8 bits": IntGrid(8, symmetric=True),
}
MASKS = ["dense", "2:4", "1:4", "4:8", "1:16", "columns 0.5", "blocks 0.5", "blocks 0.75", "blocks 0.9"]
MASKS += [f"zeros {sparsity}" for sparsity in (0.3, 0.5, 0.8, 0.9, 0.95, 0.99)]
REAL = [(64, 576), (256, 256), (512, 512)]


@pytest.mark.parametrize("mask", MASKS)
def test_size_is_within_five_percent_of_the_information(mask, tmp_path):
    """Every mask on every grid, in files of 16 KB and more; below, no more is beside the bits than the docs say."""
    for name, grid in GRIDS.items():
        model, state, least = compressed_to(mask, grid, REAL)
        packed = save_packed(model, state, tmp_path / f"{name}.safetensors")
        assert packed.size <= 1.02 * least + 500 + 40 * len(state), name
        assert packed.size <= 1.05 * least or packed.size < 16_000, name
        assert packed.dense_size == sum(4 * rows * columns for rows, columns in REAL)


def test_size_of_a_small_file(tmp_path):
    """16 KB with the batch-norms of a network, whose tensors count as they are."""
    linear, state, least = compressed_to("2:4", IntGrid(3), [(72, 9 * 64), (64, 72)])
    net = nn.Sequential(linear[0], nn.BatchNorm1d(72), linear[1], nn.BatchNorm1d(64))
    least += sum(
        value.numel() * value.element_size() for part in (net[1], net[3]) for value in part.state_dict().values()
    )
    packed = save_packed(net, {"0": state["0"], "2": state["1"]}, tmp_path / "net.safetensors")
    assert 15_000 < packed.size < 17_000
    assert packed.size <= 1.05 * least


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.shared = self.first
        self.narrow = nn.Parameter(torch.randn(3).bfloat16())
        self.register_buffer("steps", torch.tensor(7))


def test_tied_weights_attention_and_other_dtypes(tmp_path):
    model = Tied()
    state = compress_(model, IntGrid(4), 0.5)
    assert {"first", "attention.in_proj"} <= set(state)
    path = tmp_path / "tied.safetensors"
    packed = save_packed(model, state, path)
    assert not packed.notes
    other = Tied()
    load_packed(other, path)
    assert other.second.weight is other.first.weight
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    _, tensors = read_packed(path)
    assert not any(key.startswith("dense/second.weight") for key in tensors)


def test_half_precision_weights_come_back_in_their_dtype(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8)).half()
    mask = torch.rand(1, 8, 16) < 0.5
    with torch.no_grad():
        model[0].weight *= mask[0]
    save_packed(model, {"0": CompressedWeight(mask)}, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(16, 8)).half()
    load_packed(other, tmp_path / "a.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(FingerprintError, match="float32"):
        load_packed(nn.Sequential(nn.Linear(16, 8)), tmp_path / "a.safetensors")


@pytest.fixture
def packed(tmp_path):
    net = residual_net()
    state = compress_(net, IntGrid(4), 0.5)
    path = tmp_path / "net.safetensors"
    save_packed(net, state, path)
    return net, state, path


def refuses(error, match, path, model=None):
    """Loading is refused, and the model is as it was."""
    model = residual_net(seed=5) if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        load_packed(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_changed_byte_is_noticed(packed):
    _, _, path = packed
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in np.linspace(header, len(data) - 1, 12).astype(int):
        changed = bytearray(data)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        refuses(ExportError, "checksum", path)


def test_a_changed_manifest_is_noticed(packed):
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, _, path = packed
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = zlib.decompress(tensors["manifest"].numpy().tobytes())
    changed = text.replace(b'"bits":4', b'"bits":3', 1)
    assert changed != text
    tensors["manifest"] = torch.frombuffer(bytearray(zlib.compress(changed)), dtype=torch.uint8)
    save_file(tensors, path, metadata=metadata)
    refuses(ExportError, "checksum", path)


def test_files_of_version_1_are_read():
    """Written by the first version: masks of two kinds, 3-bit codes in two groups, batch-norm as it is."""
    model = nn.Sequential(nn.Linear(24, 6), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False))
    loaded = load_packed(model, Path(__file__).parent / "data" / "version_1.safetensors")
    index = torch.arange(6 * 24).reshape(6, 24)
    scale = torch.arange(1.0, 13.0).reshape(6, 2).repeat_interleave(12, 1) / 4
    expected = torch.where(index % 7 < 2, (index * 5 % 8 - 3) * scale, 0.0)
    assert torch.equal(model[0].weight, expected)
    assert (loaded["0"].bits, loaded["0"].scale.shape) == (3, (1, 6, 2))
    assert torch.equal(model[1].running_var, torch.tensor([0.0, 1, 2, 3, 4, 0]))
    index = torch.arange(24).reshape(4, 6)
    assert torch.equal(model[2].weight, torch.where(index % 3 == 1, 0.0, index % 5))


def test_newer_versions_are_refused(packed):
    _, _, path = packed
    data = path.read_bytes()
    path.write_bytes(data.replace(b'version\\":2', b'version\\":3', 1))
    refuses(ExportError, "version 3.*Expected.*version 1 to 2", path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(packed, share):
    _, _, path = packed
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refuses(ExportError, "cannot be read", path)


def test_other_files_and_other_models_are_refused(packed, tmp_path):
    _, _, path = packed
    refuses(ExportError, "does not exist", tmp_path / "nothing.safetensors")
    refuses(FingerprintError, "different", path, residual_net(width=16))
    refuses(FingerprintError, r"missing in the model: conv1\.bias", path, nn.Sequential(nn.Linear(2, 2)))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    refuses(ExportError, "not a packed model", tmp_path / "plain.safetensors")


def test_existing_files_are_kept(packed, tmp_path, monkeypatch):
    net, state, path = packed
    before = path.read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        save_packed(net, state, path)
    with pytest.raises(ExportError, match="folder does not exist"):
        save_packed(net, state, tmp_path / "no" / "a.safetensors")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(ExportError, match="No space left"):
        save_packed(net, state, path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    save_packed(net, state, path, overwrite=True)
    assert path.read_bytes() == before


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(packed):
    _, _, path = packed
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_model_that_changed_since_is_refused(packed, tmp_path):
    net, state, _ = packed
    with torch.no_grad():
        net.head.weight[0, 0] += 1
    with pytest.raises(ExportError, match="head: "):
        save_packed(net, state, tmp_path / "b.safetensors")
    with pytest.raises(LayerNotFoundError):
        save_packed(net, {"nothing": state["head"]}, tmp_path / "b.safetensors")
    with pytest.raises(ShapeError):
        save_packed(net, {"head": state["conv1"]}, tmp_path / "b.safetensors")


class Odd(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_extra_state_is_refused(tmp_path):
    with pytest.raises(ExportError, match="_extra_state"):
        save_packed(Odd(2, 2), {}, tmp_path / "a.safetensors")


def test_codes_off_their_grid_are_refused():
    mask = torch.tensor([[[True, False]]])
    grid = {"scale": torch.ones(1, 1, 1), "zero_point": torch.full((1, 1, 1), 2.0), "bits": 2}
    CompressedWeight(mask, torch.tensor([[[3, 2]]], dtype=torch.uint8), **grid)
    for codes in ([[[4, 2]]], [[[3, 1]]]):
        with pytest.raises(ShapeError, match="leave their grid"):
            CompressedWeight(mask, torch.tensor(codes, dtype=torch.uint8), **grid)


def test_the_format_is_what_its_description_says(tmp_path):
    """A reader written from docs/format.md, with Python integers for bit streams."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 6))
    (weight,) = compress_(model, IntGrid(3), "2:4").values()
    save_packed(model, {"0": weight}, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert set(stored) == {"manifest", "small"}
    manifest = json.loads(zlib.decompress(bytes(stored["manifest"].tolist())))
    data, tensors = bytes(stored["small"].tolist()), {}
    for name, dtype, shape in manifest["small"]:
        kind = np.dtype(dtype)
        tensors[name] = torch.from_numpy(np.frombuffer(data, kind, math.prod(shape)).reshape(shape).copy())
        data = data[math.prod(shape) * kind.itemsize :]
    assert torch.equal(tensors["dense/0.bias"], model[0].bias)
    entry = manifest["layers"]["0"]
    assert entry["keys"] == ["0.weight"]
    assert {key: entry["mask"][key] for key in ("kind", "n", "m")} == {"kind": "nm", "n": 2, "m": 4}

    def stream(name: str) -> int:
        return int.from_bytes(bytes(tensors[f"layer/0/{name}"].tolist()), "little")

    supports = list(itertools.combinations(range(4), 2))
    mask = torch.zeros(6 * 24, dtype=torch.bool)
    for group in range(6 * 24 // 4):
        word = stream("mask") >> (44 * (group // 17)) & (2**44 - 1)
        for position in supports[word // 6 ** (group % 17) % 6]:
            mask[4 * group + position] = True
    codes, zeros = stream("codes"), stream("zero_point")
    values = torch.zeros(6 * 24)
    for kept, index in enumerate(torch.nonzero(mask).flatten().tolist()):
        row = index // 24
        code, zero = codes >> (3 * kept) & 7, zeros >> (3 * row) & 7
        values[index] = (code - zero) * tensors["layer/0/scale"][row]
    assert torch.equal(values.reshape(6, 24), model[0].weight.detach())


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(0, 62),
    count=st.sampled_from([0, 1, 7, 8, 9, 100]),
    base=st.integers(1, 5000),
    seed=st.integers(0, 9),
)
def test_words_and_digits_come_back(width, count, base, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**width, count)
    data = bits_module.pack_words(words, width)
    assert len(data) == bits_module.words_size(count, width)
    assert (bits_module.unpack_words(data, width, count) == words).all()
    digits = rng.integers(0, base, count)
    data = bits_module.pack_digits(digits, base)
    assert len(data) == bits_module.digits_size(count, base)
    assert (bits_module.unpack_digits(data, base, count) == digits).all()


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 3, 8, 16, 36])),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.8, 1.0]),
    block=st.sampled_from([1, 2, 4]),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_masks_come_back(shape, density, block, shared, seed):
    rng = np.random.default_rng(seed)
    columns = -(-shape[2] // block)
    mask = (rng.random((shape[0], 1 if shared else shape[1], columns)) < density).repeat(block, -1)[..., : shape[2]]
    mask = np.ascontiguousarray(np.broadcast_to(mask, shape))
    description, streams = encode_mask(mask)
    description = json.loads(json.dumps(description))
    assert (decode_mask(description, streams, shape) == mask).all()
    assert sum(map(len, streams.values())) <= -(-mask.size // 8)


def test_structured_and_block_masks_are_stored_once():
    rng = np.random.default_rng(0)
    columns = np.broadcast_to((rng.random((1, 1, 64)) < 0.5).repeat(9, -1), (1, 128, 576))
    description, streams = encode_mask(np.ascontiguousarray(columns))
    assert description["shared"]
    assert sum(map(len, streams.values())) <= 72
    blocks = (rng.random((1, 128, 144)) < 0.5).repeat(4, -1)
    description, streams = encode_mask(blocks)
    assert description["block"] == 4
    assert sum(map(len, streams.values())) <= 128 * 144 / 8
