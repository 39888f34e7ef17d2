"""Elementwise arithmetic on ``LANES`` neighbouring numbers, in LLVM vectors.

numba cannot know that two short runs of an array do not overlap, and the checks that it adds cost more than sixteen
numbers' arithmetic. All arrays are flat; an index is where a run starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

LANES = 16


def _vector(context: Any, array: Any) -> ir.VectorType:
    return ir.VectorType(context.get_data_type(array.dtype), LANES)


def _address(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value, at: ir.Value) -> ir.Value:
    data = make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _vector(context, array_type).as_pointer())


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    single = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, _index(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))


def _index(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(32), value)


def _call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    kind = values[0].type
    suffix = "f32" if kind.element == ir.FloatType() else "f64"
    function_type = ir.FunctionType(kind, [kind] * len(values))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}{suffix}")
    return builder.call(function, values)


def _operation(runs: int, body: Callable[..., ir.Value], scalars: int = 0) -> Any:
    """An intrinsic ``f(*scalars, dst, dst_at, …)`` of ``runs`` runs; the first gets ``body`` of all of them."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        places = [
            _address(context, builder, signature.args[k], args[k], args[k + 1])
            for k in range(scalars, scalars + 2 * runs, 2)
        ]
        loaded = [builder.load(place, align=4) for place in places]
        spread = [_splat(builder, value) for value in args[:scalars]]
        builder.store(body(builder, *spread, *loaded), places[0], align=4)
        return context.get_dummy_value()

    def typed(*arguments: Any) -> Any:
        array = arguments[scalars]
        kinds = [array.dtype] * scalars + [array, types.intp] * runs
        return types.void(*kinds), codegen

    def two(typingctx, a, a_at, b, b_at):  # type: ignore[no-untyped-def]
        return typed(a, a_at, b, b_at)

    def three(typingctx, a, a_at, b, b_at, c, c_at):  # type: ignore[no-untyped-def]
        return typed(a, a_at, b, b_at, c, c_at)

    def scaled(typingctx, x, a, a_at, b, b_at):  # type: ignore[no-untyped-def]
        return typed(x, a, a_at, b, b_at)

    def root(typingctx, a, a_at):  # type: ignore[no-untyped-def]
        return typed(a, a_at)

    shape = {(1, 0): root, (2, 0): two, (3, 0): three, (2, 1): scaled}[runs, scalars]
    return intrinsic(shape)


def _less(builder: ir.IRBuilder, old: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    return _call(builder, "fma", builder.fneg(a), b, old)


# dst -= a·b; dst -= x·a; dst *= x·a; dst /= a; dst += a·a; dst = a; dst = √dst
less_product = _operation(3, _less)
less_scaled = _operation(2, lambda builder, x, old, a: _less(builder, old, x, a), 1)
times_scaled = _operation(2, lambda builder, x, old, a: builder.fmul(builder.fmul(old, x), a), 1)
over = _operation(2, lambda builder, old, a: builder.fdiv(old, a))
plus_square = _operation(2, lambda builder, old, a: _call(builder, "fma", a, a, old))
copy = _operation(2, lambda builder, old, a: a)
root = _operation(1, lambda builder, old: _call(builder, "sqrt", old))
