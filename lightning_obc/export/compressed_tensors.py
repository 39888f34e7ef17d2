"""Quantized linear layers in the layout that compressed-tensors reads (``pack-quantized``).

Per layer: ``weight_packed`` int32 ``[R, ceil(d·bits / 32)]``, each row a little-endian bit stream of unsigned codes;
``weight_scale`` ``[R, C]``; ``weight_shape`` int64 ``[2]``; and, when asymmetric, ``weight_zero_point`` int32
``[ceil(R·bits / 32), C]`` packed along the rows. The package itself is not needed to write it. It has no convolutions:
these, and everything else, stay ordinary tensors of the state dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.errors import ExportError
from lightning_obc.export.bits import pack_words
from lightning_obc.export.packed import plain_state
from lightning_obc.export.packed_file import write_tensors
from lightning_obc.export.weights import CompressedWeight, Solutions, compressed_state, named_layers, weight_keys
from lightning_obc.files import PathLike, check_target, write_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_compressed_tensors(
    model: nn.Module, solutions: Solutions, folder: PathLike, *, overwrite: bool = False
) -> dict[str, str]:
    """Write ``model.safetensors`` and ``config.json`` with its ``quantization_config`` into a folder.

    Args:
        model: The compressed model; not changed.
        solutions: Compressed weights by layer name.
        folder: An existing folder.
        overwrite: Replace files that are there.

    Returns:
        Compressed layers that stay ordinary tensors, with the reason.

    Raises:
        ExportError: A file exists, no layer has a form that the layout supports, or the model's weights are not those
            of the solutions.
    """
    targets = [check_target(Path(folder) / name, overwrite) for name in (WEIGHTS, CONFIG)]
    state = compressed_state(model, solutions)
    modules = named_layers(model)
    keys, left = weight_keys(model, state)
    reasons = {name: reason for name in keys if (reason := _unsupported(modules[name], state[name], keys[name]))}
    packed = {name: state[name] for name in keys if name not in reasons}
    if not packed:
        raise ExportError(
            "No layer can be stored in the layout of compressed-tensors",
            got="; ".join(f"{name}: {reason}" for name, reason in (left | reasons).items()) or "no compressed layers",
            expected="quantized nn.Linear layers",
            remedy="use save_packed, which stores every layer",
        )
    skipped = {f"{name}.weight" for name in packed}
    tensors = {key: value.cpu().contiguous().clone() for key, value in plain_state(model).items() if key not in skipped}
    for name, weight in packed.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack_linear(weight).items()}
    others = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in packed]
    config = {"quantization_config": quantization_config(packed, ignore=others)}
    _write(targets, tensors, config)
    return left | reasons


def _unsupported(module: nn.Module, weight: CompressedWeight, keys: list[str]) -> str | None:
    if type(module) is not nn.Linear:
        return f"{type(module).__name__}, not a linear layer"
    if weight.codes is None:
        return "not quantized"
    if len(keys) > 1:
        return "its weight is tied"
    return None


def pack_linear(weight: CompressedWeight) -> dict[str, Tensor]:
    """The tensors of one linear layer, ``weight_packed`` and so on."""
    assert weight.codes is not None
    assert weight.scale is not None
    assert weight.zero_point is not None
    assert weight.bits is not None
    codes = weight.codes[0]
    tensors = {
        "weight_packed": _rows_of_int32(codes, weight.bits),
        "weight_scale": weight.scale[0].contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = _rows_of_int32(weight.zero_point[0].T, weight.bits).T.contiguous()
    return tensors


def _rows_of_int32(codes: Tensor, bits: int) -> Tensor:
    """Every row of ``[rows, columns]`` as a bit stream of its own, filled up to whole int32 words."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    # 32 codes fill whole words exactly, so that rows of the padded matrix can be packed in one go.
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.int64)
    padded[:, :columns] = codes.to(torch.int64)
    data = torch.from_numpy(pack_words(padded.reshape(-1).numpy(), bits)).reshape(rows, -1)
    return data[:, : 4 * words].contiguous().view(torch.int32)


def quantization_config(weights: Mapping[str, CompressedWeight], ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model: one group of layers for every kind of grid."""
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        assert weight.scale is not None
        scales, columns = weight.scale.shape[-1], weight.mask.shape[-1]
        scheme = {
            "num_bits": weight.bits,
            "type": "int",
            "symmetric": weight.symmetric,
            "strategy": "channel" if scales == 1 else "group",
            "group_size": None if scales == 1 else columns // scales,
        }
        groups.setdefault(json.dumps(scheme), {"targets": [], "weights": scheme})["targets"].append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": ignore,
    }


def _write(targets: list[Path], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    weights, text = targets
    write_tensors(weights, tensors, {"format": "pt"})
    write_whole(text, lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
