"""ONNX files that carry our codes: quantize and dequantize nodes with the integers, scales and zero points of the grid.

Nothing is fitted again. The weight of a layer is an initialiser of signed codes (unsigned code minus
``2**(bits - 1)``), INT2 for up to 2 bits where the runtime has it, INT4 for up to 4, INT8 above, followed by
``DequantizeLinear``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from lightning_obc.activations import unquantized
from lightning_obc.errors import ExportError
from lightning_obc.export.graph import Graph, Sample, dequantize_weights, finish, fold_batch_norms, trace, without_noise
from lightning_obc.export.ops import StoredCodes, compact_scales, translations
from lightning_obc.export.packed_linear import LinearKernel, matmul_translation, use_packed_linear
from lightning_obc.export.quantized import (
    connected_tensors,
    input_tensors,
    measure_ranges,
    quantize_activations,
    share_ranges,
)
from lightning_obc.export.ranges import ActivationRange, Ranges, as_range
from lightning_obc.export.saturation import saturation_warning
from lightning_obc.export.small_types import opset_for, store_small_codes
from lightning_obc.export.weights import (
    CompressedWeight,
    Solutions,
    compressed_state,
    layer_adapter,
    named_layers,
    weight_keys,
)
from lightning_obc.files import PathLike, check_target, require, write_whole

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        path: The file.
        reference: The same computation in PyTorch, with the same rounding: quantized weights and activations.
        weights: The stored codes by the name of the parameter.
        activations: Ranges of the quantized tensors, by their name in the graph.
        folded: Batch-norms that were folded into the convolution before them.
        notes: What stayed in floating point although its layer was compressed, and warnings.
    """

    path: Path
    reference: GraphModule = field(repr=False)
    weights: Mapping[str, StoredCodes] = field(default_factory=dict, repr=False)
    activations: Mapping[str, ActivationRange] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stored_codes(
    model: nn.Module, state: Mapping[str, CompressedWeight]
) -> tuple[dict[str, StoredCodes], dict[str, list[str]], dict[str, str]]:
    """Signed codes in the layout of the module.

    Returns:
        Codes by parameter name, the parameter names by layer, and the layers whose codes cannot be stored.
    """
    modules = named_layers(model)
    keys, left = weight_keys(model, [name for name, weight in state.items() if weight.codes is not None])
    codes: dict[str, StoredCodes] = {}
    for name, parameters in keys.items():
        module, adapter = layer_adapter(name, modules)
        stored = _in_module_layout(state[name], partial(adapter.to_module_layout, module))
        codes |= dict.fromkeys(parameters, stored)
    return codes, keys, left


def _in_module_layout(weight: CompressedWeight, layout: Any) -> StoredCodes:
    assert weight.codes is not None
    assert weight.scale is not None
    assert weight.zero_point is not None
    assert weight.bits is not None
    middle = 2 ** (weight.bits - 1)
    signed = (weight.codes.to(torch.int16) - middle).to(torch.int8)
    full_scale = layout(weight.expand(weight.scale)).contiguous()
    full_zero = layout(weight.expand(weight.zero_point)).contiguous()
    scale, zero, axis, block = compact_scales(full_scale, full_zero)
    zero = (zero - middle).to(torch.int8)
    return StoredCodes(layout(signed).contiguous(), scale.float(), zero, axis, block, weight.bits)


def export_onnx(
    model: nn.Module,
    sample: Sample,
    path: PathLike,
    *,
    solutions: Solutions | None = None,
    activations: Ranges | None = None,
    calibration: Iterable[Sample] | None = None,
    activation_bits: int = 8,
    fold_batch_norm: bool | None = None,
    linear: LinearKernel = "dequantize",
    dynamic_batch: bool = True,
    overwrite: bool = False,
) -> OnnxExport:
    """Write a model as ONNX (opset 21, or 25 with codes in INT2), its quantized weights as integer codes.

    Args:
        model: Exported in evaluation mode; not changed.
        sample: Example input: a tensor, a sequence of positional arguments or a mapping of keyword arguments.
        path: The file.
        solutions: Compressed weights by layer name (``CompressionReport.solutions``). None exports floating point.
        activations: Ranges of layer inputs by layer name: ``CompressionReport.activations``, or ``(scale, zero_point)``
            of uint8 codes. Alone, exactly these inputs are quantized; with ``calibration`` they take the place of
            measured ranges. None takes those that are attached to the model (``Quantize.activations``), if any.
        calibration: Batches in the form of ``sample``. Every tensor between quantized layers is then quantized, with
            the smallest and largest value that it takes on these batches.
        activation_bits: 8, or 7 to keep ranges in codes 0 .. 127: CPUs without VNNI add pairs of products in 16 bits,
            which 8-bit activations times 8-bit weights can overflow.
        fold_batch_norm: Fold batch-norms into the convolutions before them: codes stay, scales are multiplied by the
            norm's factor. Integer convolutions need it. Default: when activations are quantized.
        linear: How linear layers with codes compute. ``"dequantize"``: from weights that the runtime makes of them,
            with operators that every runtime knows. ``"packed"``: from codes of up to 4 bits as they are, by
            ``MatMulNBits`` of ONNX Runtime, with inputs in float32; less memory, and less time where weights are read
            for few rows of input. ``"packed-int8"``: the same for all widths and in integers, the runtime rounding
            inputs to 8 bits per row and run of columns as it goes; the fastest.
        dynamic_batch: Leave the first dimension of every input open.
        overwrite: Replace an existing file.

    Raises:
        ExportError: The file exists, the model cannot be traced or translated, or its weights are not those of the
            solutions. Nothing is written then. MissingExtraError: The extra ``onnx`` is not installed.
    """
    target = check_target(path, overwrite)
    for package in ("onnx", "onnxscript"):
        require(package, "onnx")
    if activation_bits not in (7, 8):
        raise ExportError("Unknown width of activations", got=activation_bits, expected="7 or 8")
    check_linear(linear)
    state = compressed_state(model, solutions or {})
    codes, keys, left = stored_codes(model, state)
    with unquantized(model) as inputs:
        graph = trace(model, sample, dynamic_batch=dynamic_batch)
    if activations is None and inputs:
        activations = {name: one.grid for name, one in inputs.items()}
    quantized = bool(activations) or calibration is not None
    if quantized and linear != "dequantize":
        raise ExportError(
            "Linear layers from packed codes take inputs in floating point",
            got=f"linear={linear!r} and ranges of activations",
            expected="one of the two",
            remedy="activations={} leaves the ranges out; packed-int8 rounds the inputs of linear layers by itself",
        )
    on_device = {name: _moved(stored, graph) for name, stored in codes.items()}
    dequantize_weights(graph, on_device)
    if linear != "dequantize":
        left |= use_packed_linear(graph, on_device, linear)
    folded = fold_batch_norms(graph) if (quantized if fold_batch_norm is None else fold_batch_norm) else []
    ranges = _quantize(graph, keys, activations, calibration, activation_bits) if quantized else {}
    dequantized = {name for node, name in graph.weights.items() if node.users}
    graph = finish(graph)
    notes = [f"{name}: {reason}" for name, reason in left.items()]
    if ranges and activation_bits == 8 and (warning := saturation_warning(codes)):
        notes.append(warning)
        _log.warning(warning)
    bits = {name: codes[name].bits for name in dequantized}
    program = _translate(graph, opset_for(bits))
    store_small_codes(program, bits)
    write_whole(target, lambda part: _save(program, part))
    return OnnxExport(target, graph.module, codes, ranges, tuple(folded), tuple(notes))


def check_linear(linear: str) -> None:
    """Refuse a kind of linear layers that there is not.

    Raises:
        ExportError: So it is.
    """
    if linear not in get_args(LinearKernel):
        raise ExportError("Unknown kind of linear layers", got=linear, expected=", ".join(get_args(LinearKernel)))


def _moved(stored: StoredCodes, graph: Graph) -> StoredCodes:
    device = next((tensor.device for tensor in graph.module.parameters()), torch.device("cpu"))
    codes, scale, zero = (part.to(device) for part in (stored.codes, stored.scale, stored.zero_point))
    return replace(stored, codes=codes, scale=scale, zero_point=zero)


def _quantize(
    graph: Graph,
    keys: Mapping[str, list[str]],
    activations: Ranges | None,
    calibration: Iterable[Sample] | None,
    bits: int,
) -> dict[str, ActivationRange]:
    given = {name: as_range(name, value).with_bits(bits) for name, value in (activations or {}).items()}
    named = input_tensors(graph, given, keys)
    if calibration is None:
        return quantize_activations(graph, named)
    measured = measure_ranges(graph, connected_tensors(graph), calibration, bits)
    return quantize_activations(graph, share_ranges(measured | named))


def _translate(graph: Graph, opset: int) -> Any:
    args, kwargs = graph.arguments
    try:
        with torch.no_grad(), without_noise():
            program = torch.onnx.export(
                graph.module,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=graph.shapes,
                custom_translation_table=translations() | matmul_translation(),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            "The model cannot be translated to ONNX",
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="operators that PyTorch's ONNX exporter supports",
            remedy="replace the operator, or leave that part of the model out of the export",
        ) from error
    assert program is not None
    return program


def _first_line(error: BaseException) -> str:
    """The root cause in one line; exporters wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _save(program: Any, part: Path) -> None:
    import onnx_ir as ir

    for node in program.model.graph.all_nodes():
        # Stack traces name the files of the machine that exported.
        node.metadata_props.clear()
    ir.save(program.model, part, format="protobuf")
