"""Packed safetensors: compressed weights in the bits they need, the rest of the state dict beside them.

The format is described in ``docs/format.md``, the file around it is :mod:`lightning_obc.export.packed_file`. A file is
refused by a model of another structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_obc.activations import InputGrid, attach, attached, detach, inputs_from_state, inputs_state
from lightning_obc.errors import ExportError, FingerprintError
from lightning_obc.export import bits
from lightning_obc.export.masks import decode_mask, encode_mask
from lightning_obc.export.packed_file import read_packed, write_packed
from lightning_obc.export.resizing import Sizes, resize_
from lightning_obc.export.weights import (
    CompressedWeight,
    Solutions,
    compressed_state,
    layer_adapter,
    named_layers,
    weight_keys,
)
from lightning_obc.files import PathLike, check_target
from lightning_obc.layers import normalise_name


@dataclass(frozen=True)
class PackedFile:
    """What was written.

    Attributes:
        path: The file.
        size: Its size in bytes.
        dense_size: Bytes of the state dict as it is in the model.
        packed: Names of the layers that are stored in packed form.
        notes: Layers that are stored like any other tensor, and why.
    """

    path: Path
    size: int
    dense_size: int
    packed: tuple[str, ...]
    notes: Mapping[str, str]

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense state dict."""
        return self.dense_size / self.size


def save_packed(
    model: nn.Module, solutions: Solutions, path: PathLike, *, sizes: Sizes | None = None, overwrite: bool = False
) -> PackedFile:
    """Write a compressed model's state dict, its compressed weights packed.

    Args:
        model: The compressed model; not changed. Ranges of quantized inputs that are attached to it go along.
        solutions: Compressed weights by layer name, such as ``CompressionReport.solutions``.
        path: The file.
        sizes: ``Shrunk.sizes`` of a model that :func:`~lightning_obc.shrink` made: the large model loads the file too.
        overwrite: Replace an existing file.

    Raises:
        ExportError: The file exists or cannot be written, the model's weights are not those of the solutions, or its
            state dict holds something other than tensors. Nothing is written then.
    """
    target = check_target(path, overwrite)
    weights = compressed_state(model, solutions)
    state = plain_state(model)
    owners, left = weight_keys(model, weights)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    modules = named_layers(model)
    for name, keys in owners.items():
        module, adapter = layer_adapter(name, modules)
        layers[name], streams = pack_weight(weights[name], adapter.weight_matrix(module).cpu())
        layers[name]["keys"] = keys
        tensors |= {f"layer/{name}/{part}": value for part, value in streams.items()}
    packed_keys = {key for keys in owners.values() for key in keys}
    aliases = _add_dense(state, packed_keys, tensors)
    manifest = {"layers": layers, "aliases": aliases, "model": structure(state)} | _pack_inputs(model, tensors)
    manifest |= {"sizes": sizes} if sizes else {}
    write_packed(target, manifest, tensors)
    dense = sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key not in aliases)
    return PackedFile(target, target.stat().st_size, dense, tuple(owners), left)


def _pack_inputs(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the ranges of quantized inputs; what the manifest says of them, nothing when there are none."""
    state = inputs_state(attached(model))
    for name, one in state.items():
        tensors |= {f"input/{name}/{part}": one.pop(part) for part in ("scale", "zero_point")}
    return {"inputs": state} if state else {}


def _read_inputs(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, InputGrid]:
    parts = ("scale", "zero_point")
    return inputs_from_state(
        {
            name: one | {part: tensors[f"input/{name}/{part}"] for part in parts}
            for name, one in manifest.get("inputs", {}).items()
        }
    )


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the ``_orig_mod`` of compiled modules, sharing memory with the model.

    Raises:
        ExportError: It holds something other than tensors.
    """
    state = {normalise_name(key): value for key, value in model.state_dict().items()}
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ExportError(
            "The state dict holds something other than tensors",
            got=", ".join(odd),
            expected="tensors alone",
            remedy="remove the extra state of these modules, or save them apart",
        )
    return {key: value.detach() for key, value in state.items()}


def structure(state: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Dtype and shape of every entry of a state dict: what makes two models' files interchangeable."""
    return {key: [str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in state.items()}


def _add_dense(state: Mapping[str, Tensor], packed: set[str], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add everything that is not packed; tensors that share memory are stored once.

    Returns:
        Entries that are stored under another entry's name.
    """
    seen: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for key, value in state.items():
        if key in packed:
            continue
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device)
        if value.numel() and place in seen:
            aliases[key] = seen[place]
            continue
        seen[place] = key
        tensors[f"dense/{key}"] = value.cpu().contiguous().clone()
    return aliases


def pack_weight(weight: CompressedWeight, matrix: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of one compressed weight.

    Args:
        weight: Mask, codes and grid.
        matrix: The weight itself, ``[g, R, d]``; its kept entries are stored when there are no codes.
    """
    mask, streams = encode_mask(weight.mask.numpy())
    tensors = {part: torch.from_numpy(stream) for part, stream in streams.items()}
    entry: dict[str, Any] = {
        "shape": list(weight.mask.shape),
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "mask": mask,
    }
    if weight.codes is None or weight.scale is None or weight.zero_point is None or weight.bits is None:
        tensors["values"] = matrix[weight.mask].contiguous()
        return entry, tensors
    entry |= {"bits": weight.bits, "symmetric": weight.symmetric, "groups": weight.scale.shape[-1]}
    tensors["codes"] = _packed(weight.codes[weight.mask], weight.bits)
    tensors["scale"] = _once(weight.scale)
    tensors["zero_point"] = _packed(_once(weight.zero_point), weight.bits)
    entry["zero_points"] = _once(weight.zero_point).numel()
    return entry, tensors


def _packed(values: Tensor, width: int) -> Tensor:
    return torch.from_numpy(bits.pack_words(values.to(torch.int64).reshape(-1).numpy(), width))


def _once(tensor: Tensor) -> Tensor:
    """A single number where all entries are equal (grids per tensor, symmetric zero points)."""
    first = tensor.reshape(-1)[:1]
    return (first if bool((tensor == first).all()) else tensor.reshape(-1)).clone()


def unpack_weight(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[CompressedWeight, Tensor]:
    """Inverse of :func:`pack_weight`: the compressed weight, and the weight matrix ``[g, R, d]`` itself."""
    shape = tuple(entry["shape"])
    streams = {part: tensors[part].numpy() for part in ("mask", "mask_remainders") if part in tensors}
    mask = torch.from_numpy(decode_mask(entry["mask"], streams, shape))
    dtype = getattr(torch, entry["dtype"])
    if "bits" not in entry:
        matrix = torch.zeros(shape, dtype=dtype)
        matrix[mask] = tensors["values"]
        return CompressedWeight(mask), matrix
    width, scales = int(entry["bits"]), (*shape[:2], int(entry["groups"]))
    scale = _spread(tensors["scale"], scales)
    zero = _spread(_unpacked(tensors["zero_point"], width, int(entry["zero_points"])).to(scale.dtype), scales)
    codes = zero.repeat_interleave(shape[2] // scales[2], dim=-1).to(torch.uint8)
    codes[mask] = _unpacked(tensors["codes"], width, int(mask.sum())).to(torch.uint8)
    weight = CompressedWeight(mask, codes, scale, zero, width, bool(entry["symmetric"]))
    return weight, weight.dequantize().to(dtype)


def _unpacked(data: Tensor, width: int, count: int) -> Tensor:
    return torch.from_numpy(bits.unpack_words(np.asarray(data.numpy()), width, count))


def _spread(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.expand(shape).contiguous() if tensor.numel() == 1 else tensor.reshape(shape)


def load_packed(model: nn.Module, path: PathLike) -> dict[str, CompressedWeight]:
    """Load a packed file into a model in place, bit for bit, and quantize inputs as it says.

    A file of a shrunk model makes a model of the sizes before smaller first.
    Everything is read and checked before the first tensor of the model is written.

    Returns:
        The compressed weights by layer name, as :func:`~lightning_obc.export.export_onnx` and
        :func:`save_packed` take them.

    Raises:
        ExportError: The file is missing, damaged, or of another format.
        FingerprintError: It was written from a model with other tensors.
    """
    manifest, tensors = read_packed(path)
    undo: Callable[[], None] | None = None
    if manifest.get("sizes") and structure(plain_state(model)) != manifest["model"]:
        undo = resize_(getattr(model, "_orig_mod", model), manifest["model"], manifest["sizes"])
    try:
        return _load(model, manifest, tensors, path)
    except Exception:
        if undo is not None:
            undo()
        raise


def _load(
    model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], path: PathLike
) -> dict[str, CompressedWeight]:
    state = plain_state(model)
    _check_structure(manifest["model"], structure(state), path)
    values = {key.removeprefix("dense/"): value for key, value in tensors.items() if key.startswith("dense/")}
    values |= {key: values[source] for key, source in manifest["aliases"].items()}
    modules = named_layers(model)
    weights: dict[str, CompressedWeight] = {}
    matrices: dict[str, Tensor] = {}
    for name, entry in manifest["layers"].items():
        prefix = f"layer/{name}/"
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        weights[name], matrices[name] = unpack_weight(entry, parts)
        module, adapter = layer_adapter(name, modules)
        adapter.check_matrix(module, matrices[name])
    inputs = _read_inputs(manifest, tensors)
    detach(model)
    attach(model, inputs)
    with torch.no_grad():
        for key, value in values.items():
            state[key].copy_(value)
        for name, matrix in matrices.items():
            module, adapter = layer_adapter(name, modules)
            adapter.write_weight_(module, matrix)
    return weights


def _check_structure(stored: Mapping[str, Any], found: Mapping[str, Any], path: PathLike) -> None:
    missing, extra = sorted(set(stored) - set(found)), sorted(set(found) - set(stored))
    changed = [
        f"{key}: file {stored[key]}, model {found[key]}" for key in stored if found.get(key) not in (None, stored[key])
    ]
    if missing or extra or changed:
        parts = [
            f"{label} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for label, names in (
                ("missing in the model:", missing),
                ("not in the file:", extra),
                ("different:", changed),
            )
            if names
        ]
        raise FingerprintError(
            "The packed file belongs to another model",
            got=f"{path}: {'; '.join(parts)}",
            expected="a model with the same state-dict keys, shapes and dtypes",
            remedy="build the model as it was when the file was written",
        )
