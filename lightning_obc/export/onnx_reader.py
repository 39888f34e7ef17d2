"""What an ONNX file holds of quantized weights and activations, read back from its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_obc.export.ops import StoredCodes, compact_scales
from lightning_obc.export.packed_linear import NODE, PARTS, PackedCodes
from lightning_obc.files import PathLike, require


def read_onnx_weights(path: PathLike) -> dict[str, StoredCodes]:
    """The weights that ``DequantizeLinear`` nodes make from stored codes, and those that ``MatMulNBits`` computes from.

    Names are those of the codes without their suffix; equal tensors are stored once, so tied weights appear under one
    of their names, and ``bits`` is 2, 4 or 8, the width of the stored codes.
    """
    onnx = require("onnx", "onnx")
    graph = onnx.load(str(path)).graph
    stored = {proto.name: proto for proto in graph.initializer}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    weights = {}
    for node in graph.node:
        if node.op_type == NODE:
            weights[node.input[1].removesuffix(f"_{PARTS['codes']}")] = _packed_weight(onnx, node, stored)
        if node.op_type != "DequantizeLinear":
            continue
        name = casts.get(node.input[0], node.input[0])
        if name in stored:
            weights[name.partition("_codes")[0]] = _weight(onnx, node, stored, name)
    return weights


def _weight(onnx: Any, node: Any, stored: Mapping[str, Any], name: str) -> StoredCodes:
    codes, scale, zero = (_tensor(onnx, stored[key]) for key in (name, *node.input[1:3]))
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    width = {onnx.TensorProto.INT4: 4, getattr(onnx.TensorProto, "INT2", None): 2}.get(stored[name].data_type, 8)
    return StoredCodes(codes, scale, zero, attributes.get("axis", 1), attributes.get("block_size", 0), width)


def _packed_weight(onnx: Any, node: Any, stored: Mapping[str, Any]) -> StoredCodes:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    codes, scale, zero = (_tensor(onnx, stored[key]) for key in node.input[1:4])
    columns, block, bits = (attributes[key] for key in ("K", "block_size", "bits"))
    packed = PackedCodes(codes, scale, zero, columns, block, bits)
    middle = 2 ** (bits - 1)
    signed, zeros = (part - middle for part in packed.unpack())
    full = scale.repeat_interleave(block, 1)[:, :columns]
    compact, points, axis, run = compact_scales(full, zeros)
    return StoredCodes(signed.to(torch.int8), compact, points.to(torch.int8), axis, run, bits)


def _tensor(onnx: Any, proto: Any) -> Tensor:
    array = onnx.numpy_helper.to_array(proto)
    small = proto.data_type in (onnx.TensorProto.INT4, getattr(onnx.TensorProto, "INT2", None))
    return torch.from_numpy(array.astype("int8") if small else array.copy())
