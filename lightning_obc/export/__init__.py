"""Files that other tools run: ONNX with our codes, packed safetensors, 2:4 layers on CUDA, and what they gain."""

from __future__ import annotations

from lightning_obc.export.compressed_tensors import save_compressed_tensors
from lightning_obc.export.layer_runner import layer_runner, model_runner
from lightning_obc.export.onnx_export import OnnxExport, export_onnx
from lightning_obc.export.onnx_reader import read_onnx_weights
from lightning_obc.export.packed import PackedFile, load_packed, save_packed
from lightning_obc.export.packed_file import read_packed
from lightning_obc.export.packed_linear import LinearKernel
from lightning_obc.export.ranges import ActivationRange
from lightning_obc.export.runtime import Measurement, benchmark, benchmark_table, open_session, slower_files
from lightning_obc.export.semi_structured import Conversion, Conversions, to_semi_structured
from lightning_obc.export.shrink import Shrunk, shrink
from lightning_obc.export.weights import CompressedWeight, compressed_state, named_layers

__all__ = [
    "ActivationRange",
    "CompressedWeight",
    "Conversion",
    "Conversions",
    "LinearKernel",
    "Measurement",
    "OnnxExport",
    "PackedFile",
    "Shrunk",
    "benchmark",
    "benchmark_table",
    "compressed_state",
    "export_onnx",
    "layer_runner",
    "load_packed",
    "model_runner",
    "named_layers",
    "open_session",
    "read_onnx_weights",
    "read_packed",
    "save_compressed_tensors",
    "save_packed",
    "shrink",
    "slower_files",
    "to_semi_structured",
]
