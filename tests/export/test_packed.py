"""Packed files: bit for bit, near the information-theoretic size, and refused by name when something is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from compressed_models import compress_, residual_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_obc.errors import ExportError, FingerprintError, LayerNotFoundError, ShapeError
from lightning_obc.export import CompressedWeight, load_packed, read_packed, save_packed
from lightning_obc.export import bits as bits_module
from lightning_obc.export.bits import entropy_bits
from lightning_obc.export.masks import decode_mask, encode_mask
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


def information(weight: CompressedWeight, pattern: object) -> float:
    """Bits that a compressed weight cannot do without: mask, codes or values of kept weights, and its grid."""
    kept, total = int(weight.mask.sum()), weight.mask.numel()
    if isinstance(pattern, str):
        n, m = map(int, pattern.split(":"))
        mask = total / m * math.log2(math.comb(m, n))
    else:
        mask = total * entropy_bits(kept / total)
    if weight.codes is None:
        return mask + 32 * kept
    zero_points = 0 if weight.symmetric else weight.bits * weight.scale.numel()
    return mask + weight.bits * kept + 32 * weight.scale.numel() + zero_points


@pytest.mark.parametrize(
    ("grid", "pattern"),
    [(None, 0.5), (None, 0.9), (None, "2:4"), (None, "4:8"), (IntGrid(4), None), (IntGrid(3), "2:4")]
    + [(IntGrid(4, symmetric=True), sparsity) for sparsity in (0.3, 0.6, 0.8, 0.95)],
    ids=str,
)
def test_size_is_within_five_percent_of_the_information(grid, pattern, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(128, 128, 3, bias=False), nn.BatchNorm2d(128), nn.Linear(1024, 1024))
    state = compress_(net, grid, pattern)
    packed = save_packed(net, state, tmp_path / "net.safetensors")
    weights = {f"{name}.weight" for name in state}
    rest = sum(value.numel() * value.element_size() for key, value in net.state_dict().items() if key not in weights)
    least = rest + sum(information(weight, pattern) for weight in state.values()) / 8
    assert packed.size <= 1.05 * least
    assert packed.dense_size == sum(v.numel() * v.element_size() for v in net.state_dict().values())


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
    _, _, path = packed
    data = path.read_bytes()
    changed = re.sub(rb'(\\+"bits\\+":)4', rb"\g<1>3", data, count=1)
    assert changed != data
    path.write_bytes(changed)
    refuses(ExportError, "checksum", path)


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
    manifest, tensors = read_packed(tmp_path / "a.safetensors")
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
