"""Quantized linear layers in the layouts that compressed-tensors reads.

``pack-quantized``: ``weight_packed`` int32 ``[R, ceil(d·bits / 32)]``, each row a little-endian bit stream of unsigned
codes; ``weight_scale`` ``[R, C]``; ``weight_shape`` int64 ``[2]``; and, when asymmetric, ``weight_zero_point`` int32
``[ceil(R·bits / 32), C]`` packed along the rows.

``int-quantized``, for 8-bit weights behind quantized inputs, which integer kernels take: ``weight`` int8 ``[R, d]``
(code minus 128), ``weight_scale`` and ``weight_zero_point`` int8 ``[R, C]``.

Both, where inputs are quantized: ``input_scale`` ``[1]`` and, when asymmetric, ``input_zero_point`` int8 ``[1]``. The
package itself is not needed to write it. It has no convolutions: these, and everything else, stay ordinary tensors of
the state dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.activations import InputGrid, attached
from lightning_obc.errors import ExportError
from lightning_obc.export.bits import pack_words
from lightning_obc.export.packed import plain_state
from lightning_obc.export.packed_file import write_tensors
from lightning_obc.export.weights import CompressedWeight, Solutions, compressed_state, named_layers, weight_keys
from lightning_obc.files import PathLike, check_target, replacing

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PACKED, INT8 = "pack-quantized", "int-quantized"


def save_compressed_tensors(
    model: nn.Module, solutions: Solutions, folder: PathLike, *, overwrite: bool = False
) -> dict[str, str]:
    """Write ``model.safetensors`` and ``config.json`` with its ``quantization_config`` into a folder.

    Args:
        model: The compressed model; not changed. Ranges of quantized inputs that are attached to it go along.
        solutions: Compressed weights by layer name.
        folder: An existing folder.
        overwrite: Replace files that are there.

    Returns:
        Compressed layers that stay ordinary tensors, and those whose inputs do, with the reason.

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
    inputs, floating = _inputs(model, packed)
    for name, weight in packed.items():
        parts = _layout(weight, inputs.get(name))[1] | _input_tensors(inputs.get(name))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    others = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in packed]
    _write(targets, tensors, {"quantization_config": quantization_config(packed, inputs, ignore=others)})
    return left | reasons | floating


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


def int8_linear(weight: CompressedWeight) -> dict[str, Tensor]:
    """The tensors of one linear layer of 8 bits in the layout ``int-quantized``."""
    assert weight.codes is not None
    assert weight.scale is not None
    assert weight.zero_point is not None
    tensors = {"weight": _signed(weight.codes[0]), "weight_scale": weight.scale[0].contiguous()}
    return tensors if weight.symmetric else tensors | {"weight_zero_point": _signed(weight.zero_point[0])}


def _signed(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8).contiguous()


def _layout(weight: CompressedWeight, inputs: InputGrid | None) -> tuple[str, dict[str, Tensor]]:
    if weight.bits == 8 and inputs is not None:
        return INT8, int8_linear(weight)
    return PACKED, pack_linear(weight)


def _inputs(model: nn.Module, packed: Mapping[str, CompressedWeight]) -> tuple[dict[str, InputGrid], dict[str, str]]:
    """Ranges of quantized inputs that the layout can hold, and why others stay in floating point."""
    found = {name: grid for name, grid in attached(model).items() if name in packed}
    wide = {name: grid for name, grid in found.items() if grid.axis is not None}
    left = dict.fromkeys(wide, "its input has a range per channel, which the layout does not hold; left out")
    return {name: grid for name, grid in found.items() if name not in wide}, left


def _input_tensors(inputs: InputGrid | None) -> dict[str, Tensor]:
    if inputs is None:
        return {}
    scale = inputs.grid.scale.detach().cpu().flatten().clone()
    if inputs.spec.symmetric:
        return {"input_scale": scale}
    zero = inputs.grid.zero_point.detach().cpu().flatten() - 2 ** (inputs.spec.bits - 1)
    return {"input_scale": scale, "input_zero_point": zero.to(torch.int8)}


def _rows_of_int32(codes: Tensor, bits: int) -> Tensor:
    """Every row of ``[rows, columns]`` as a bit stream of its own, filled up to whole int32 words."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    # 32 codes fill whole words exactly, so that rows of the padded matrix can be packed in one go.
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.int64)
    padded[:, :columns] = codes.to(torch.int64)
    data = torch.from_numpy(pack_words(padded.reshape(-1).numpy(), bits)).reshape(rows, -1)
    return data[:, : 4 * words].contiguous().view(torch.int32)


def quantization_config(
    weights: Mapping[str, CompressedWeight], inputs: Mapping[str, InputGrid], ignore: list[str]
) -> dict[str, Any]:
    """The ``quantization_config`` of a model: one group of layers for every kind of grid."""
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        scheme = {
            "weights": _weight_arguments(weight),
            "input_activations": _input_arguments(inputs.get(name)),
            "format": _layout(weight, inputs.get(name))[0],
        }
        groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})["targets"].append(name)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": ignore,
    }


def _weight_arguments(weight: CompressedWeight) -> dict[str, Any]:
    assert weight.scale is not None
    scales, columns = weight.scale.shape[-1], weight.mask.shape[-1]
    return {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "channel" if scales == 1 else "group",
        "group_size": None if scales == 1 else columns // scales,
    }


def _input_arguments(inputs: InputGrid | None) -> dict[str, Any] | None:
    if inputs is None:
        return None
    given = {"num_bits": inputs.spec.bits, "type": "int", "symmetric": inputs.spec.symmetric}
    return given | {"strategy": "tensor", "dynamic": False}


def _write(targets: list[Path], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Both files or none: the small one is complete before the large one takes its place."""
    weights, text = targets
    with replacing(text) as part:
        part.write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(weights, tensors, {"format": "pt"})
