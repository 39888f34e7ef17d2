"""Codes in the smallest integer type of ONNX that the runtime executes correctly: INT2, INT4, else INT8."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

OPSET, INT2_OPSET, INT2_IR = 21, 25, 13
_PROBE = np.array([[-2, -1, 0, 1, 1], [1, 0, -1, -2, 0]], np.int8)


def stored_bits(bits: int) -> int:
    """Width of the type that holds codes of ``bits`` bits: 2, 4 or 8."""
    if bits <= 2 and runs_int2():
        return 2
    return 4 if bits <= 4 else 8


def opset_for(bits: Mapping[str, int]) -> int:
    """The opset that the stored types of all weights need: 25 for INT2, otherwise 21, which more runtimes read."""
    return INT2_OPSET if any(stored_bits(width) == 2 for width in bits.values()) else OPSET


@lru_cache(maxsize=1)
def runs_int2() -> bool:
    """Whether the installed ONNX Runtime computes rightly with INT2 codes, found by running a small model."""
    try:
        import ml_dtypes
        import onnx_ir as ir
        import onnxruntime

        codes = ir.Value(name="codes", type=ir.TensorType(ir.DataType.INT2), shape=ir.Shape(_PROBE.shape))
        codes.const_value = ir.tensor(_PROBE.astype(ml_dtypes.int2), dtype=ir.DataType.INT2, name="codes")
        cast = ir.node("Cast", [codes], {"to": ir.DataType.INT8})
        cast.outputs[0].name, cast.outputs[0].type = "wide", ir.TensorType(ir.DataType.INT8)
        cast.outputs[0].shape = ir.Shape(_PROBE.shape)
        graph = ir.Graph([], cast.outputs, nodes=[cast], initializers=[codes], opset_imports={"": INT2_OPSET}, name="g")
        model = ir.serde.serialize_model(ir.Model(graph, ir_version=INT2_IR)).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return bool(np.array_equal(session.run(None, {})[0], _PROBE))
    except Exception:
        # Whatever goes wrong, also in a library of another age, means that the type cannot be relied on.
        return False


def store_small_codes(program: Any, bits: Mapping[str, int]) -> None:
    """Store codes of up to 4 bits as INT4 or INT2; a cast brings them to INT8, which runtimes fold at loading."""
    import ml_dtypes
    import onnx_ir as ir

    types = {2: (ir.DataType.INT2, ml_dtypes.int2), 4: (ir.DataType.INT4, ml_dtypes.int4)}
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        width = stored_bits(bits.get(name.rpartition("_codes")[0], 8))
        if width == 8:
            continue
        kind, numpy_type = types[width]
        small = f"{name}_int{width}"
        packed = ir.Value(name=small, type=ir.TensorType(kind), shape=value.shape)
        packed.const_value = ir.tensor(value.const_value.numpy().astype(numpy_type), dtype=kind, name=small)
        cast = ir.node("Cast", [packed], {"to": ir.DataType.INT8}, name=f"{name}_cast")
        cast.outputs[0].name = f"{name}_int8"
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.INT8), value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(name)
        graph.register_initializer(packed)
        graph.insert_before(graph[0], cast)
    if opset_for(bits) == INT2_OPSET:
        program.model.ir_version = max(program.model.ir_version, INT2_IR)
