"""Linear layers that compute from packed codes, as ONNX Runtime's operator ``MatMulNBits`` does.

A dense product with few rows of input does little more than read its weights from memory. Codes of 4 bits are an eighth
of that to read, and become numbers in registers. The operator wants one scale per run of ``block`` columns of a row,
``block`` a power of two: scales per tensor and per row are repeated, scales per group of columns are taken where the
groups are made of such runs.

Index legend: ``N`` rows (outputs), ``K`` columns (inputs), ``B = ceil(K / block)`` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from lightning_obc.brief import Brief
from lightning_obc.export.graph import LINEAR, Graph, insert_tensor
from lightning_obc.export.ops import NAMESPACE, StoredCodes, spread

LinearKernel = Literal["dequantize", "packed", "packed-int8"]
DOMAIN, NODE = "com.microsoft", "MatMulNBits"
# Widths that the runtime has fast kernels for: 2 bits, and 8 bits beside inputs in floating point, have none.
_WIDTHS: dict[str, tuple[int, ...]] = {"packed": (4,), "packed-int8": (4, 8)}
_BLOCKS = (128, 64, 32, 16)
# Attributes of the packed codes, and how their initialisers' names end.
PARTS = {"codes": "packed", "scale": "packed_scale", "zero_point": "packed_zero_point"}
# The runtime's names for products in float32, and in integers.
_FLOAT_LEVEL, _INT8_LEVEL = 1, 4
_MAX_INT8 = 127


@dataclass(frozen=True, repr=False)
class PackedCodes(Brief):
    """Codes of a linear layer in the layout of ``MatMulNBits``.

    Attributes:
        codes: ``[N, B, block · bits / 8]`` uint8, unsigned codes, the lowest bits first; the last run is filled up with
            its zero point.
        scale: ``[N, B]`` float32.
        zero_point: ``[N, ceil(B · bits / 8)]`` uint8, packed like the codes.
        columns: ``K``.
        block: Columns per scale.
        bits: Bits per stored code, 4 or 8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: int
    block: int
    bits: int

    @classmethod
    def of(cls, stored: StoredCodes, kernel: LinearKernel) -> PackedCodes | str:
        """Pack the codes ``[N, K]`` of a linear layer, or say why the operator cannot take them."""
        bits = next((width for width in _WIDTHS[kernel] if stored.bits <= width), None)
        if bits is None:
            return f"the runtime has no fast kernel for {stored.bits} bits with inputs in floating point"
        scale, zero = (_full(part, stored) for part in (stored.scale, stored.zero_point))
        block = _block_size(scale, zero, bits)
        if block is None:
            return f"scales hold for fewer than {min(_BLOCKS)} columns, or for no multiple of {min(_BLOCKS)}"
        middle, rows = 2 ** (stored.bits - 1), len(scale)
        codes, zero = (part.to(torch.int16) + middle for part in (stored.codes, zero))
        zero = zero[:, ::block]
        filled = zero.repeat_interleave(block, 1)
        filled[:, : codes.shape[1]] = codes
        packed = _pack(filled, bits).reshape(rows, -1, block * bits // 8)
        return cls(packed, scale[:, ::block].float().contiguous(), _pack(zero, bits), codes.shape[1], block, bits)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Codes and zero points ``[N, K]`` int16."""
        runs = self.codes.shape[1]
        codes = _unpack(self.codes.flatten(1), runs * self.block, self.bits)
        zero = _unpack(self.zero_point, runs, self.bits).repeat_interleave(self.block, 1)
        return codes[:, : self.columns], zero[:, : self.columns]

    def dequantize(self) -> Tensor:
        """``[N, K]`` float32 weights."""
        codes, zero = self.unpack()
        return (codes - zero) * self.scale.repeat_interleave(self.block, 1)[:, : self.columns] + 0.0


def use_packed_linear(graph: Graph, stored: Mapping[str, StoredCodes], kernel: LinearKernel) -> dict[str, str]:
    """Let linear layers with dequantized weights compute from packed codes; the graph is edited in place.

    Args:
        graph: Traced, its weights dequantized.
        stored: Codes by the name of the parameter.
        kernel: ``"packed"`` or ``"packed-int8"``.

    Returns:
        Why a weight that a linear layer uses stayed as it was, by the name of the parameter.
    """
    packed: dict[str, PackedCodes | str] = {}
    left: dict[str, str] = {}
    operator = matmul_packed()
    for node in list(graph.module.graph.nodes):
        name = _weight_name(graph, node)
        if name is None:
            continue
        if name not in packed:
            packed[name] = PackedCodes.of(stored[name], kernel)
        codes = packed[name]
        if isinstance(codes, str) or (reason := _unfit_input(node)) is not None:
            left[name] = codes if isinstance(codes, str) else str(reason)
            continue
        parts = [insert_tensor(graph, f"{name}_{suffix}", getattr(codes, part), node) for part, suffix in PARTS.items()]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        with graph.module.graph.inserting_before(node):
            arguments = (node.args[0], *parts, bias, codes.columns, codes.block, codes.bits, kernel == "packed-int8")
            new = graph.module.graph.call_function(operator, arguments)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.module.graph.erase_node(node)
    graph.module.graph.lint()
    return left


def _weight_name(graph: Graph, node: Node) -> str | None:
    """The parameter that a linear layer's dequantized weight comes from."""
    if node.op != "call_function" or node.target not in LINEAR or not isinstance(node.args[1], Node):
        return None
    return graph.weights.get(node.args[1])


def _unfit_input(node: Node) -> str | None:
    """Why the operator cannot take the input of this use of a weight."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    if isinstance(value, Tensor) and (value.dtype != torch.float32 or value.dim() < 2):
        return f"its input is {value.dtype} with {value.dim()} dimensions; the operator is exported for float32 rows"
    return None


def _full(part: Tensor, stored: StoredCodes) -> Tensor:
    return spread(part, stored.codes.shape, stored.axis, stored.block).expand(stored.codes.shape)


def _block_size(scale: Tensor, zero: Tensor, bits: int) -> int | None:
    """The run length with the fewest bytes that no scale changes inside of; the longest of several."""

    def size(block: int) -> int:
        runs = -(-scale.shape[1] // block)
        return runs * (block * bits // 8 + 4) + -(-runs * bits // 8)

    def uniform(block: int) -> bool:
        starts = torch.arange(scale.shape[1], device=scale.device) // block * block
        return bool((scale == scale[:, starts]).all() and (zero == zero[:, starts]).all())

    return min((block for block in _BLOCKS if uniform(block)), key=size, default=None)


def _pack(values: Tensor, bits: int) -> Tensor:
    """``[N, n]`` codes as ``[N, ceil(n · bits / 8)]`` bytes, the first code of a byte lowest; rows start at a byte."""
    per_byte = 8 // bits
    parts = F.pad(values, (0, -values.shape[1] % per_byte)).unflatten(1, (-1, per_byte)).unbind(-1)
    packed = torch.zeros_like(parts[0])
    for index, part in enumerate(parts):
        packed |= part << (bits * index)
    return packed.to(torch.uint8)


def _unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1)[:, :count].to(torch.int16)


def rounded_inputs(x: Tensor, block: int) -> Tensor:
    """Inputs ``[…, K]`` as the runtime's integer kernels see them: 8 bits per run of ``block`` entries of a row.

    The scale of a run is its largest magnitude / 127, and the zero point is 0.
    """
    columns = x.shape[-1]
    runs = F.pad(x, (0, -columns % block)).unflatten(-1, (-1, block))
    scale = runs.abs().amax(-1, keepdim=True) / _MAX_INT8
    codes = torch.round(runs / torch.where(scale > 0, scale, 1.0))
    return (codes * scale).flatten(-2)[..., :columns]


@lru_cache(maxsize=1)
def matmul_packed() -> Callable[..., Tensor]:
    """Register the operator once and return it: a linear layer ``[…, K]`` → ``[…, N]`` from :class:`PackedCodes`."""

    @torch.library.custom_op(f"{NAMESPACE}::matmul_packed", mutates_args=())
    def product(
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Optional[Tensor],
        columns: int,
        block: int,
        bits: int,
        integer: bool,
    ) -> Tensor:
        weight = PackedCodes(codes, scale, zero_point, columns, block, bits).dequantize()
        return F.linear(rounded_inputs(x, block) if integer else x, weight, bias)

    @product.register_fake
    def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], len(codes)))

    operator: Callable[..., Tensor] = getattr(torch.ops, NAMESPACE).matmul_packed.default
    return operator


def matmul_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the operator becomes in ONNX, for ``torch.onnx.export``."""
    node = _onnx_operator()

    def product(
        x: Any,
        codes: Any,
        scale: Any,
        zero_point: Any,
        bias: Any,
        columns: int,
        block: int,
        bits: int,
        integer: bool,
    ) -> Any:
        inputs = (x, codes, scale, zero_point) if bias is None else (x, codes, scale, zero_point, None, bias)
        level = _INT8_LEVEL if integer else _FLOAT_LEVEL
        return node(*inputs, K=columns, N=codes.shape[0], bits=bits, block_size=block, accuracy_level=level)

    return {matmul_packed(): product}


def _onnx_operator() -> Any:
    """``MatMulNBits`` for onnxscript, which knows no operators but ONNX's own."""
    from lightning_obc.files import require

    defs, values = require("onnx", "onnx").defs, require("onnxscript", "onnx").values
    optional = defs.OpSchema.FormalParameterOption.Optional
    inputs = [defs.OpSchema.FormalParameter(name, kind) for name, kind in (("A", "T"), ("B", "C"), ("scales", "T"))]
    inputs += [
        defs.OpSchema.FormalParameter(name, kind, param_option=optional)
        for name, kind in (("zero_points", "C"), ("g_idx", "I"), ("bias", "T"))
    ]
    schema = defs.OpSchema(
        NODE,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[defs.OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("C", ["tensor(uint8)"], ""), ("I", ["tensor(int32)"], "")],
        attributes=[
            defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT)
            for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), NODE, schema)
