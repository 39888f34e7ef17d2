"""What one elimination does to a run of positions, in registers: correct, move, score (LLVM).

``column -= Σ_k v_k v_k[p]`` (the panel's earlier columns), ``v = column/√G_pp``, ``w -= z v``, ``diag G -= v²``, and
the scores of the moved weights. Apart, every one of these would read and write memory for the sake of two or three
operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from lightning_obc.kernels.obs_sweep.tile import PANEL_VECTORS, VECTOR_BYTES, emit_products, fma, load, splat, store

_INDEX = ir.IntType(64)


@dataclass
class _Run:
    """Arrays and scalars of a run, in LLVM."""

    builder: ir.IRBuilder
    vector: ir.VectorType
    lines: dict[str, ir.Value]  # where the run starts in every array
    scalars: dict[str, ir.Value]  # spread over a vector

    def read(self, name: str, j: int) -> ir.Value:
        return load(self.builder, self.lines[name], j * self.vector.count, self.vector)

    def write(self, name: str, j: int, value: ir.Value) -> None:
        store(self.builder, value, self.lines[name], j * self.vector.count, self.vector)

    def call(self, name: str, *values: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.vector, [self.vector] * len(values))
        suffix = "f32" if self.vector.element == ir.FloatType() else "f64"
        function = cgutils.get_or_insert_function(
            self.builder.module, kind, f"llvm.{name}.v{self.vector.count}{suffix}"
        )
        # Of two numbers, none is NaN unless the matrix is broken, which the pivot's check sees.
        return self.builder.call(function, values, fastmath=("nnan", "nsz") if len(values) == 2 else ())


# Arrays and scalars that both sweeps score with, and those of a quantization.
_ARRAYS, _GRID = ("weight", "diagonal", "penalty", "score"), ("scale", "inverse_scale", "zero_point")
_SCALARS, _GRID_SCALARS = ("big",), ("zero", "max_code", "outlier")


def _score(run: _Run, j: int, quantize: bool, weight: ir.Value, diagonal: ir.Value) -> ir.Value:
    """Cost of fixing every weight; what must not be chosen costs ``big``.

    Clipped outliers score below zero, the largest squared error lowest, so that one minimum finds both.
    """
    b = run.builder
    if not quantize:
        value = b.fdiv(b.fmul(weight, weight), diagonal)
    else:
        scale, zero_point = run.read("scale", j), run.read("zero_point", j)
        nearest = b.fadd(run.call("rint", b.fmul(weight, run.read("inverse_scale", j))), zero_point)
        code = run.call("minnum", run.call("maxnum", nearest, run.scalars["zero"]), run.scalars["max_code"])
        error = fma(b, b.fneg(b.fsub(code, zero_point)), scale, weight)
        square = b.fmul(error, error)
        limit = b.fmul(run.scalars["outlier"], b.fmul(scale, scale))
        far = b.and_(b.fcmp_ordered("!=", nearest, code), b.fcmp_ordered(">", square, limit))
        value = b.select(far, b.fneg(square), b.fdiv(square, diagonal))
    free = b.fcmp_ordered("==", run.read("penalty", j), ir.Constant(run.vector, [0.0] * run.vector.count))
    return b.select(free, value, run.scalars["big"])


def _emit_scores(
    run: _Run, vectors: int, quantize: bool, moved: list[tuple[ir.Value, ir.Value]], best: ir.Value
) -> None:
    lowest = load(run.builder, best, 0, run.vector)
    for j in range(vectors):
        weight, diagonal = moved[j]
        value = _score(run, j, quantize, weight, diagonal)
        run.write("score", j, value)
        lowest = run.call("minnum", lowest, value)
    store(run.builder, lowest, best, 0, run.vector)


def _start_run(
    context: Any,
    builder: ir.IRBuilder,
    dtype: Any,
    s: ir.Value,
    scratch: Any,
    o: ir.Value,
    options: Any,
    start: ir.Value,
    quantize: bool,
) -> _Run:
    """A run at ``start`` of the arrays of a ``Scratch``, with the scalars of ``Options``."""
    vector = ir.VectorType(context.get_data_type(dtype), VECTOR_BYTES * 8 // dtype.bitwidth)

    def place(name: str) -> ir.Value:
        k = scratch.fields.index(name)
        array = make_array(scratch.types[k])(context, builder, builder.extract_value(s, k))
        return builder.gep(array.data, [start])

    names = _ARRAYS + (_GRID if quantize else ())
    values = _SCALARS + (_GRID_SCALARS if quantize else ())
    scalars = {name: splat(builder, builder.extract_value(o, options.fields.index(name)), vector) for name in values}
    return _Run(builder, vector, {name: place(name) for name in names}, scalars)


def _best(context: Any, builder: ir.IRBuilder, s: ir.Value, scratch: Any) -> ir.Value:
    k = scratch.fields.index("best")
    return make_array(scratch.types[k])(context, builder, builder.extract_value(s, k)).data


def _make_step(quantize: bool, vectors: int) -> Any:
    """``step(own, first, left, ld, depth, root, z, start, s, o)``: one tile of a step.

    ``own``, ``first`` and ``left`` are offsets in ``s.panel``: of the column at these positions, of the panel's first
    column there, and of the panel's first column at the pivot; ``ld`` is the distance between columns.
    """

    def step(typingctx, own, first, left, ld, depth, inverse_root, z, start, s, o):  # type: ignore[no-untyped-def]
        dtype = s.types[s.fields.index("panel")].dtype

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            k = s.fields.index("panel")
            panel = make_array(s.types[k])(context, builder, builder.extract_value(args[8], k)).data
            run = _start_run(context, builder, dtype, args[8], s, args[9], o, args[7], quantize)
            run.lines["column"] = builder.gep(panel, [args[0]])
            a, b = builder.gep(panel, [args[2]]), builder.gep(panel, [args[1]])
            products = emit_products(builder, run.vector, 1, vectors, (a, args[3]), (b, args[3]), args[4], True)
            root, z = splat(builder, args[5], run.vector), splat(builder, builder.fneg(args[6]), run.vector)
            moved = []
            for j in range(vectors):
                v = builder.fmul(builder.fsub(run.read("column", j), products[j]), root)
                run.write("column", j, v)
                moved.append(
                    (
                        fma(builder, z, v, run.read("weight", j)),
                        fma(builder, builder.fneg(v), v, run.read("diagonal", j)),
                    )
                )
                run.write("weight", j, moved[j][0])
                run.write("diagonal", j, moved[j][1])
            _emit_scores(run, vectors, quantize, moved, _best(context, builder, args[8], s))
            return context.get_dummy_value()

        index = types.intp
        return types.void(index, index, index, index, index, dtype, dtype, index, s, o), codegen

    return intrinsic(step)


def _make_scores(quantize: bool) -> Any:
    """``scores(start, s, o)``: the scores of one vector of positions."""

    def scores(typingctx, start, s, o):  # type: ignore[no-untyped-def]
        dtype = s.types[s.fields.index("panel")].dtype

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            run = _start_run(context, builder, dtype, args[1], s, args[2], o, args[0], quantize)
            here = [(run.read("weight", 0), run.read("diagonal", 0))]
            _emit_scores(run, 1, quantize, here, _best(context, builder, args[1], s))
            return context.get_dummy_value()

        return types.void(types.intp, s, o), codegen

    return intrinsic(scores)


step_prune, step_quantize = _make_step(False, PANEL_VECTORS), _make_step(True, PANEL_VECTORS)
half_step_prune, half_step_quantize = _make_step(False, PANEL_VECTORS // 2), _make_step(True, PANEL_VECTORS // 2)
scores_prune, scores_quantize = _make_scores(False), _make_scores(True)


def _find(typingctx, array, value, count):  # type: ignore[no-untyped-def]
    """The first of ``count`` elements, in whole vectors, that equals ``value``; -1 where there is none."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes = VECTOR_BYTES * 8 // array.dtype.bitwidth
        vector, bits = ir.VectorType(context.get_data_type(array.dtype), lanes), ir.IntType(lanes)
        data = make_array(array)(context, builder, args[0]).data
        wanted = splat(builder, args[1], vector)
        before, function = builder.block, builder.function
        loop, following, end = (function.append_basic_block(f"find.{name}") for name in ("loop", "next", "end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_INDEX)
        equal = builder.bitcast(
            builder.fcmp_ordered("==", load(builder, builder.gep(data, [at]), 0, vector), wanted), bits
        )
        hit = builder.icmp_unsigned("!=", equal, bits(0))
        builder.cbranch(hit, end, following)
        builder.position_at_end(following)
        more = builder.add(at, _INDEX(lanes))
        builder.cbranch(builder.icmp_signed("<", more, args[2]), loop, end)
        at.add_incoming(_INDEX(0), before)
        at.add_incoming(more, following)
        builder.position_at_end(end)
        lane = builder.zext(builder.cttz(equal, ir.Constant(ir.IntType(1), 0)), _INDEX)
        return builder.select(hit, builder.add(at, lane), _INDEX(-1))

    return types.intp(array, array.dtype, types.intp), codegen


find: Any = intrinsic(_find)
