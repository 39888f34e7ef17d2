"""The register tile that all float arithmetic of the CPU sweep runs through: ``dst = src - aᵀ b``.

numba's loops do not keep a block of accumulators in registers, so the tile is written in LLVM IR: ``rows × vectors``
vector accumulators, one broadcast of ``a`` and one fused multiply-add per accumulator and depth step. LLVM lowers it to
the host's own vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_INDEX = ir.IntType(64)
_INT32 = ir.IntType(32)


def _target_features() -> set[str]:
    """What the processor that numba compiles for can do: the host, unless numba was told otherwise."""
    stated = vars(config).get("CPU_FEATURES")
    flags = (llvm.get_host_cpu_features().flatten() if stated is None else stated).split(",")
    return {flag[1:] for flag in flags if flag.startswith("+")}


TARGET_FEATURES = _target_features()


def _vector_bytes() -> int:
    if "avx512f" in TARGET_FEATURES:
        return 64
    return 32 if {"avx2", "fma"} <= TARGET_FEATURES else 16


VECTOR_BYTES = _vector_bytes()
# 16 registers hold 4×2 accumulators and their operands, 32 registers (AVX-512, NEON) hold 8×2.
FLUSH_ROWS = 4 if VECTOR_BYTES == 32 else 8
FLUSH_VECTORS = 2
PANEL_VECTORS = 8
# The pivot columns of a block are corrected so many at a time; 16 registers hold 4×2 accumulators.
BLOCK_ROWS = 4
BLOCK_VECTORS = 4 if VECTOR_BYTES == 64 else 2


def flush_columns(dtype: np.dtype[Any]) -> int:
    """Columns of one flush tile."""
    return FLUSH_VECTORS * VECTOR_BYTES // dtype.itemsize


def panel_columns(dtype: np.dtype[Any]) -> int:
    """Columns of one panel tile, which has a single row."""
    return PANEL_VECTORS * VECTOR_BYTES // dtype.itemsize


def block_columns(dtype: np.dtype[Any]) -> int:
    """Columns of one tile of a block's pivot columns."""
    return BLOCK_VECTORS * VECTOR_BYTES // dtype.itemsize


def _make_tile(rows: int, vectors: int) -> Callable[..., None]:
    """A numba intrinsic ``tile(dst, dst_at, dst_ld, src, src_at, src_ld, a, a_at, a_ld, b, b_at, b_ld, depth)``.

    ``dst[i, j] = src[i, j] - Σ_k a[k, i] b[k, j]`` for ``rows`` rows and ``vectors`` vectors of columns. All arrays are
    flat; ``_at`` is the offset of the first element and ``_ld`` the distance between rows, in elements; ``depth >= 1``.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typingctx, dst, dst_at, dst_ld, src, src_at, src_ld, a, a_at, a_ld, b, b_at, b_ld, depth
    ):
        index = types.intp
        signature = types.void(dst, index, index, src, index, index, a, index, index, b, index, index, index)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            element = context.get_data_type(dst.dtype)
            lanes = VECTOR_BYTES * 8 // dst.dtype.bitwidth

            def address(position: int) -> ir.Value:
                array = make_array(signature.args[position])(context, builder, args[position])
                return builder.gep(array.data, [args[position + 1]])

            operands = [(address(position), args[position + 2]) for position in (0, 3, 6, 9)]
            _emit(builder, element, lanes, rows, vectors, operands, args[12])
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _emit(
    builder: ir.IRBuilder,
    element: ir.Type,
    lanes: int,
    rows: int,
    vectors: int,
    operands: list[tuple[ir.Value, ir.Value]],
    depth: ir.Value,
) -> None:
    (dst, dst_ld), (src, src_ld), a, b = operands
    vector = ir.VectorType(element, lanes)
    if rows > 1:
        for row in range(rows):
            prefetch(builder, builder.gep(src, [builder.mul(src_ld, _INDEX(row))]), vectors * VECTOR_BYTES)
    products = emit_products(builder, vector, rows, vectors, a, b, depth)
    for row in range(rows):
        for v in range(vectors):
            old = load(builder, src, v * lanes, vector)
            store(builder, builder.fsub(old, products[row * vectors + v]), dst, v * lanes, vector)
        src, dst = builder.gep(src, [src_ld]), builder.gep(dst, [dst_ld])


def emit_products(
    builder: ir.IRBuilder,
    vector: ir.VectorType,
    rows: int,
    vectors: int,
    left_operand: tuple[ir.Value, ir.Value],
    right_operand: tuple[ir.Value, ir.Value],
    depth: ir.Value,
    may_be_empty: bool = False,
) -> list[ir.Value]:
    """``Σ_k a[k, i] b[k, j]`` in ``rows × vectors`` registers, row after row.

    An operand is where it starts and the distance of its rows. ``depth >= 1`` unless ``may_be_empty``.
    """
    (a, a_ld), (b, b_ld), lanes = left_operand, right_operand, vector.count
    before, function = builder.block, builder.function
    loop, end = function.append_basic_block("tile.loop"), function.append_basic_block("tile.end")
    if may_be_empty:
        builder.cbranch(builder.icmp_signed(">", depth, _INDEX(0)), loop, end)
    else:
        builder.branch(loop)
    builder.position_at_end(loop)
    counter, a_row, b_row = builder.phi(_INDEX), builder.phi(a.type), builder.phi(b.type)
    sums = [builder.phi(vector) for _ in range(rows * vectors)]
    right = [load(builder, b_row, v * lanes, vector) for v in range(vectors)]
    updated = []
    for row in range(rows):
        left = splat(builder, builder.load(builder.gep(a_row, [_INDEX(row)])), vector)
        updated += [fma(builder, left, right[v], sums[row * vectors + v]) for v in range(vectors)]
    following = builder.add(counter, _INDEX(1))
    for phi, start, value in (
        (counter, _INDEX(0), following),
        (a_row, a, builder.gep(a_row, [a_ld])),
        (b_row, b, builder.gep(b_row, [b_ld])),
        *((phi, ir.Constant(vector, [0.0] * lanes), value) for phi, value in zip(sums, updated, strict=True)),
    ):
        phi.add_incoming(start, before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
    builder.position_at_end(end)
    if not may_be_empty:
        return updated
    none, totals = ir.Constant(vector, [0.0] * lanes), [builder.phi(vector) for _ in updated]
    for phi, value in zip(totals, updated, strict=True):
        phi.add_incoming(none, before)
        phi.add_incoming(value, loop)
    return totals


def prefetch(builder: ir.IRBuilder, start: ir.Value, bytes_: int) -> None:
    """Fetch what is updated after the products, while they are being formed."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    line = builder.bitcast(start, byte)
    for at in range(0, bytes_, 64):
        builder.call(function, [builder.gep(line, [_INDEX(at)]), _INT32(1), _INT32(3), _INT32(1)])


def load(builder: ir.IRBuilder, start: ir.Value, offset: int, vector: ir.VectorType) -> ir.Value:
    pointer = builder.bitcast(builder.gep(start, [_INDEX(offset)]), vector.as_pointer())
    return builder.load(pointer, align=4)


def store(builder: ir.IRBuilder, value: ir.Value, start: ir.Value, offset: int, vector: ir.VectorType) -> None:
    builder.store(value, builder.bitcast(builder.gep(start, [_INDEX(offset)]), vector.as_pointer()), align=4)


def splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, scalar, _INT32(0))
    return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(_INT32, vector.count), None))


def fma(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    vector = x.type
    name = f"llvm.fma.v{vector.count}{'f32' if vector.element == ir.FloatType() else 'f64'}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
    return builder.call(function, [x, y, z])


flush_tile = _make_tile(FLUSH_ROWS, FLUSH_VECTORS)
panel_tile = _make_tile(1, PANEL_VECTORS)
block_tile = _make_tile(BLOCK_ROWS, BLOCK_VECTORS)
line_tile = _make_tile(1, FLUSH_VECTORS)
