"""Columns that stay move together: register tiles that read from where rows and columns were (LLVM).

A sweep's matrix loses rows and columns at every panel's end. Those that stay keep their order, so a vector of
neighbours comes from slightly more neighbours: from two, rarely three, aligned vectors, by one or two permutations of
registers. Reading them so inside the flush costs a fraction of moving single columns through strided memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from lightning_obc.kernels.obs_sweep.tile import (
    FLUSH_ROWS,
    FLUSH_VECTORS,
    TARGET_FEATURES,
    VECTOR_BYTES,
    emit_products,
    load,
    prefetch,
    store,
)

_INT32, _INDEX = ir.IntType(32), ir.IntType(64)
# How the sources of a vector are spread: over two aligned vectors, over three, or further.
NEAR, FAR, SCATTERED = 0, 1, 2
SOURCES = 3


def permutes(itemsize: int) -> bool:
    """Whether the processor permutes whole registers of such floats by an index in another register."""
    if "avx512f" in TARGET_FEATURES:
        return True
    return VECTOR_BYTES == 32 and itemsize == 4


_PERMUTES = {4: permutes(4), 8: permutes(8)}


def _permute(builder: ir.IRBuilder, index: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """``(low ++ high)[index]`` of every lane; higher bits of an index do not count."""
    vector, lanes = low.type, low.type.count
    if "avx512f" in TARGET_FEATURES:
        double = vector.element == ir.DoubleType()
        if double:
            index = builder.zext(index, ir.VectorType(_INDEX, lanes))
        name = f"llvm.x86.avx512.vpermi2var.{'pd' if double else 'ps'}.512"
        kind = ir.FunctionType(vector, [vector, index.type, vector])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [low, index, high])
    kind = ir.FunctionType(vector, [vector, index.type])
    one = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
    in_low = builder.icmp_unsigned("==", builder.and_(index, _all(index.type, lanes)), _all(index.type, 0))
    return builder.select(in_low, builder.call(one, [low, index]), builder.call(one, [high, index]))


def _all(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _from_aligned(builder: ir.IRBuilder, far: bool, index: ir.Value, places: list[ir.Value]) -> ir.Value:
    """A vector from the aligned ones at ``places``."""
    element, lanes = places[0].type.pointee, index.type.count
    vector = ir.VectorType(element, lanes)
    low, high = load(builder, places[0], 0, vector), load(builder, places[1], 0, vector)
    near = _permute(builder, index, low, high)
    if not far:
        return near
    third = load(builder, places[2], 0, vector)
    inside = builder.icmp_unsigned("<", index, _all(index.type, 2 * lanes))
    return builder.select(inside, near, _permute(builder, index, third, third))


def _data(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value) -> ir.Value:
    return make_array(array_type)(context, builder, array).data


def _make_moving_tile(rows: int, vectors: int, width: int) -> Callable[..., None]:
    """An intrinsic like the plain tile, with ``src[i, j]`` taken from where row ``i`` and column ``j`` were.

    ``tile(dst, dst_at, src, origin, relative, start, reach, row, column, a, a_at, a_ld, b, b_at, b_ld, depth)``; the
    matrices are in packed column blocks of ``width``. See :class:`~lightning_obc.kernels.obs_sweep.packed.Moves`.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typingctx, dst, dst_at, src, origin, relative, start, reach, row, column, a, a_at, a_ld, b, b_at, b_ld, depth
    ):
        index = types.intp
        signature = types.void(
            *(dst, index, src, origin, relative, start, index, index, index, a, index, index, b, index, index, index)
        )

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            data = {k: _data(context, builder, signature.args[k], args[k]) for k in (0, 2, 3, 4, 5, 9, 12)}
            _emit_moving(builder, rows, vectors, width, dst.dtype.bitwidth, data, args)
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _emit_moving(
    builder: ir.IRBuilder, rows: int, vectors: int, width: int, bits: int, data: dict[int, ir.Value], args: Any
) -> None:
    target, source, origin, relative, start = (data[k] for k in (0, 2, 3, 4, 5))
    reach, row, column, depth = args[6], args[7], args[8], args[15]
    lanes = VECTOR_BYTES * 8 // bits
    vector, indices = ir.VectorType(source.type.pointee, lanes), ir.VectorType(_INT32, lanes)
    group = builder.sdiv(column, _INDEX(lanes))
    lines = [
        builder.gep(source, [builder.mul(_wide(builder, origin, builder.add(row, _INDEX(i))), _INDEX(width))])
        for i in range(rows)
    ]
    bases = [
        [
            _item(builder, start, builder.add(builder.mul(group, _INDEX(SOURCES)), _INDEX(v * SOURCES + k)))
            for k in range(3)
        ]
        for v in range(vectors)
    ]
    for line in lines:
        for base in (*bases[0][:2], *(base[1] for base in bases[1:])):
            prefetch(builder, builder.gep(line, [base]), 1)
    left = builder.gep(data[9], [args[10]]), args[11]
    right = builder.gep(data[12], [args[13]]), args[14]
    products = emit_products(builder, vector, rows, vectors, left, right, depth)
    index = [load(builder, builder.gep(relative, [column]), v * lanes, indices) for v in range(vectors)]
    place = builder.gep(target, [args[1]])

    def near(i: int, v: int, far: bool = False) -> ir.Value:
        return _from_aligned(builder, far, index[v], [builder.gep(lines[i], [base]) for base in bases[v]])

    offsets: list[list[ir.Value]] = []

    def scattered(i: int, v: int) -> ir.Value:
        if not offsets:
            offsets.extend(_offsets(builder, origin, column, u * lanes, lanes, width) for u in range(vectors))
        value = ir.Constant(vector, ir.Undefined)
        for lane, offset in enumerate(offsets[v]):
            value = builder.insert_element(value, builder.load(builder.gep(lines[i], [offset])), _INT32(lane))
        return value

    def put(old: Callable[[int, int], ir.Value]) -> None:
        for i in range(rows):
            for v in range(vectors):
                changed = builder.fsub(old(i, v), products[i * vectors + v])
                store(builder, changed, place, i * width + v * lanes, vector)

    _switch(
        builder, reach, bits, [lambda: put(near), lambda: put(lambda i, v: near(i, v, True)), lambda: put(scattered)]
    )


def _switch(builder: ir.IRBuilder, reach: ir.Value, bits: int, cases: list[Callable[[], None]]) -> None:
    """One of the ways to read; only the last where the processor does not permute."""
    if not _PERMUTES[bits // 8]:
        cases[-1]()
        return
    end = builder.function.append_basic_block("move.end")
    branches = [builder.function.append_basic_block("move.case") for _ in cases]
    switch = builder.switch(reach, branches[-1])
    for value, branch in enumerate(branches[:-1]):
        switch.add_case(_INDEX(value), branch)
    for branch, case in zip(branches, cases, strict=True):
        builder.position_at_end(branch)
        case()
        builder.branch(end)
    builder.position_at_end(end)


def _item(builder: ir.IRBuilder, array: ir.Value, at: ir.Value) -> ir.Value:
    return builder.load(builder.gep(array, [at]))


def _wide(builder: ir.IRBuilder, array: ir.Value, at: ir.Value) -> ir.Value:
    return builder.zext(_item(builder, array, at), _INDEX)


def _offsets(
    builder: ir.IRBuilder, origin: ir.Value, column: ir.Value, first: int, lanes: int, width: int
) -> list[ir.Value]:
    """Where the sources of a vector's lanes lie in the first row of a packed matrix."""
    found = []
    for lane in range(lanes):
        was = _wide(builder, origin, builder.add(column, _INDEX(first + lane)))
        block = builder.udiv(was, _INDEX(width))
        before = builder.mul(builder.mul(block, builder.add(block, _INDEX(1))), _INDEX(width * width // 2))
        found.append(builder.add(before, builder.urem(was, _INDEX(width))))
    return found


def _move_run(typingctx, array, target, low, high, third, relative, at, far):  # type: ignore[no-untyped-def]
    """One vector at ``target`` of an array from those at ``low``, ``high`` and, if ``far``, ``third``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes = VECTOR_BYTES // (array.dtype.bitwidth // 8)
        data, chosen = (_data(context, builder, signature.args[k], args[k]) for k in (0, 5))
        index = load(builder, builder.gep(chosen, [args[6]]), 0, ir.VectorType(_INT32, lanes))
        places = [builder.gep(data, [args[k]]) for k in (2, 3, 4)]
        if _PERMUTES[array.dtype.bitwidth // 8]:
            near = _from_aligned(builder, False, index, places)
            both = _from_aligned(builder, True, index, places)
            value = builder.select(args[7], both, near)
            store(builder, value, builder.gep(data, [args[1]]), 0, value.type)
        return context.get_dummy_value()

    index = types.intp
    return types.void(array, index, index, index, index, relative, index, types.boolean), codegen


move_run: Any = intrinsic(_move_run)


def moving_tile(width: int) -> Any:
    """The tile of a flush that moves, for matrices in column blocks of ``width``."""
    return _make_moving_tile(FLUSH_ROWS, FLUSH_VECTORS, width)
