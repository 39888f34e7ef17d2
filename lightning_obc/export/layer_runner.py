"""One layer at one level in ONNX Runtime, to be timed: floating point, packed codes, or integers from end to end."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_obc.errors import ExportError
from lightning_obc.export.graph import Sample
from lightning_obc.export.onnx_export import check_linear, export_onnx
from lightning_obc.export.ops import operators
from lightning_obc.export.packed_linear import LinearKernel
from lightning_obc.export.ranges import ActivationRange
from lightning_obc.export.runtime import open_session, random_inputs
from lightning_obc.export.weights import CompressedWeight
from lightning_obc.files import require
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.layers import adapter_for
from lightning_obc.specs import IntGrid


class Precision(Protocol):
    """What is asked of a level here."""

    @property
    def grid(self) -> IntGrid | None: ...

    @property
    def activations(self) -> int | None: ...


class _Rounded(nn.Module):
    """A layer whose output is quantized, as that of a layer inside an integer network is."""

    def __init__(self, layer: nn.Module, output: ActivationRange) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", torch.tensor(output.scale))
        self.register_buffer("zero_point", torch.tensor(output.zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return operators()[1](self.layer(x), self.scale, self.zero_point, 255)


class _Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def layer_runner(
    *, threads: int = 1, linear: LinearKernel = "dequantize"
) -> Callable[[str, nn.Module, Tensor, Precision], Callable[[], Any]]:
    """A ``runner`` of :func:`lightning_obc.allocation.measure_latency` that runs layers in ONNX Runtime on the CPU.

    A level with quantized weights and activations takes uint8 codes and gives uint8 codes: what quantizes the input of
    the whole network, and dequantizes its output, is no part of any layer. With ``linear`` a level of a linear layer
    that quantizes weights alone runs from packed codes, as :func:`export_onnx` with this option makes it. Every other
    level runs in floating point. The values of codes make no difference to the time, and integers of any width run as
    int8 once they are loaded, so that a layer is exported once for all integer levels, once for every packed grid, and
    once for all others.

    Args:
        threads: Threads of the runtime; 0 lets it choose.
        linear: How the files will be exported.

    Raises:
        ExportError: An unknown ``linear``. MissingExtraError: The extra ``onnx`` is not installed.
    """
    require("onnxruntime", "onnx")
    check_linear(linear)

    sessions: dict[tuple[str, bool, IntGrid | None], Callable[[], Any]] = {}

    def runner(name: str, module: nn.Module, x: Tensor, level: Precision) -> Callable[[], Any]:
        integer = level.grid is not None and level.activations is not None
        packed = None if linear == "dequantize" or integer else _packed_grid(module, level.grid)
        key = name, integer, packed
        if key not in sessions:
            try:
                sessions[key] = _prepare(module, x, integer, threads, packed, linear)
            except ExportError as error:
                raise ExportError(
                    f"Layer {name!r} cannot be timed in ONNX Runtime",
                    got=f"{level}: {error.message}: {error.got}",
                    expected="a layer that can be exported alone",
                    remedy="exclude it, or supply its times in a table",
                ) from error
        return sessions[key]

    return runner


def _packed_grid(module: nn.Module, grid: IntGrid | None) -> IntGrid | None:
    """The grid that a layer runs from packed codes of. One whose groups do not fit is no level that it can have."""
    if grid is None or not isinstance(module, nn.Linear):
        return None
    return None if grid.group_size and module.in_features % grid.group_size else grid


def model_runner(model: nn.Module, sample: Sample, *, threads: int = 1) -> Callable[[], Any]:
    """The whole model in floating point in ONNX Runtime: ``whole`` of :func:`lightning_obc.allocation.measure_latency`.

    Args:
        model: Not changed.
        sample: Example input, as :func:`export_onnx` takes it.
        threads: Threads of the runtime; 0 lets it choose.

    Raises:
        ExportError: The model cannot be exported, or has no floating inputs. MissingExtraError: The extra ``onnx`` is
            not installed.
    """
    with tempfile.TemporaryDirectory(prefix="lightning-obc-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(copy.deepcopy(model).cpu().float(), _on_cpu(sample), path, dynamic_batch=False)
        session = open_session(path, threads=threads)
    inputs = random_inputs(session, 1, {entry.name: entry.shape for entry in session.get_inputs()})
    return lambda: session.run(None, inputs)


def _on_cpu(sample: Sample) -> Sample:
    if isinstance(sample, Tensor):
        return sample.cpu().float() if sample.is_floating_point() else sample.cpu()
    if isinstance(sample, Mapping):
        return {key: _on_cpu(value) if isinstance(value, Tensor) else value for key, value in sample.items()}
    return tuple(_on_cpu(value) if isinstance(value, Tensor) else value for value in sample)


def _prepare(
    module: nn.Module, x: Tensor, integer: bool, threads: int, packed: IntGrid | None, linear: LinearKernel
) -> Callable[[], Any]:
    x = x.detach().cpu().float()
    layer = copy.deepcopy(module).cpu().float().eval()
    with tempfile.TemporaryDirectory(prefix="lightning-obc-") as folder:
        path = Path(folder) / "layer.onnx"
        if integer:
            feed = _export_integer(layer, x, path)
        else:
            weights = {} if packed is None else {"layer": _rounded_weight(layer, packed)}
            export_onnx(_Plain(layer), x, path, solutions=weights, linear=linear, dynamic_batch=False)
            feed = x.numpy()
        session = open_session(path, threads=threads)
    inputs = {session.get_inputs()[0].name: feed}
    return lambda: session.run(None, inputs)


def _export_integer(layer: nn.Module, x: Tensor, path: Path) -> np.ndarray[Any, Any]:
    """Write the layer with integer input and output; returns codes for the input."""
    # 7 bits take the same kernels as 8, and cannot saturate anywhere.
    weight = _rounded_weight(layer, IntGrid(7, symmetric=True))
    with torch.no_grad():
        output = layer(x)
    limits = _range_of(x)
    export_onnx(
        _Rounded(layer, _range_of(output)),
        x,
        path,
        solutions={"layer": weight},
        activations={"layer": limits},
        dynamic_batch=False,
    )
    _strip_ends(path)
    codes = torch.clamp(torch.round(x / limits.scale) + limits.zero_point, 0, 255)
    return np.asarray(codes.to(torch.uint8).numpy())


def _rounded_weight(layer: nn.Module, grid: IntGrid) -> CompressedWeight:
    """Round a layer's weight to nearest, in place."""
    adapter = adapter_for(layer)
    assert adapter is not None
    weight = adapter.weight_matrix(layer)
    fitted = fit_grid(weight, grid, channels=adapter.shape(layer).channels)
    adapter.write_weight_(layer, fitted.quantize(weight))
    return CompressedWeight.from_weight(adapter.weight_matrix(layer), None, fitted)


def _range_of(x: Tensor) -> ActivationRange:
    low, high = torch.aminmax(x)
    return ActivationRange.between(float(low), float(high))


def _strip_ends(path: Path) -> None:
    """Take the first quantization and the last dequantization out of a file: codes go in, codes come out."""
    onnx = require("onnx", "onnx")
    model = onnx.load(path)
    graph = model.graph
    entry, exit_ = graph.input[0], graph.output[0]
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == entry.name)
    last = next(node for node in graph.node if node.op_type == "DequantizeLinear" and exit_.name in node.output)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == first.output[0]:
                node.input[index] = entry.name
    exit_.name = last.input[0]
    graph.node.remove(first)
    graph.node.remove(last)
    for end in (entry, exit_):
        end.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    keep = [value for value in graph.value_info if value.name not in {entry.name, exit_.name}]
    del graph.value_info[:]
    graph.value_info.extend(keep)
    onnx.save(model, path)
