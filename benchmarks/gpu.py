"""Time the sweep on a CUDA device, and show its launch plan on any machine.

    python benchmarks/gpu.py           # needs a CUDA device; writes benchmarks/results/gpu.md
    python benchmarks/gpu.py --plan    # bytes, flop and compiled resources; needs no device

Nothing is reported unless parity with the oracle holds. Times are medians of ``--repeats`` runs after one that is
thrown away; random inputs of the layers' shapes, since the work does not depend on the values.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_obc.kernels.hessian_update.precision import exact_products
from lightning_obc.kernels.obs_sweep import GridInput, NMGroups, SweepInput, SweepOutput, sweep_prune, sweep_quantize
from lightning_obc.linalg import safe_inverse

RESULTS = Path(__file__).parent / "results" / "gpu.md"


class Shape(NamedTuple):
    """``layers`` of a network share one matrix shape."""

    rows: int
    columns: int
    layers: int

    @property
    def flop(self) -> float:
        """Two thirds ``R d³`` for every layer: both triangles are kept."""
        return self.layers * 2 / 3 * self.rows * float(self.columns) ** 3


# Convolutions as matrices (output channels × input channels · kernel positions), and the classifier.
RESNET50 = [
    Shape(64, 147, 1),
    Shape(64, 64, 1),
    Shape(256, 64, 4),
    Shape(64, 256, 2),
    Shape(64, 576, 3),
    Shape(128, 256, 1),
    Shape(512, 256, 1),
    Shape(512, 128, 4),
    Shape(128, 512, 3),
    Shape(128, 1152, 4),
    Shape(256, 512, 1),
    Shape(1024, 512, 1),
    Shape(1024, 256, 6),
    Shape(256, 1024, 5),
    Shape(256, 2304, 6),
    Shape(512, 1024, 1),
    Shape(2048, 1024, 1),
    Shape(2048, 512, 3),
    Shape(512, 2048, 2),
    Shape(512, 4608, 3),
    Shape(1000, 2048, 1),
]
WIDE = Shape(4096, 4096, 1)


# ------------------------------------------------------------------------------------------------- the plan
def traffic(shape: Shape) -> tuple[float, float]:
    """Bytes to and from memory, panels and flushes, if no cache helped: float32, unstructured."""
    from lightning_obc.kernels.obs_sweep.triton_chunk import Tuning

    tuning, size, panels, flushes = Tuning(), shape.columns, 0.0, 0.0
    while size > 0:
        steps = tuning.panel(size)
        panels += 4 * size * (steps * (steps - 1) / 2 + 8 * steps)
        size -= steps
        flushes += 2 * 4 * float(size) ** 2
    return shape.layers * shape.rows * panels, shape.layers * shape.rows * flushes


def print_plan() -> None:
    """Work of every ResNet-50 shape and of a wide layer, then what the kernels compile to."""
    print("| R×d | layers | flop | panel bytes | flush bytes |\n|---|---|---|---|---|")
    total = [0.0, 0.0, 0.0]
    for shape in [*RESNET50, WIDE]:
        panel, flush = traffic(shape)
        if shape is not WIDE:
            total = [a + b for a, b in zip(total, (shape.flop, panel, flush), strict=True)]
        print(f"| {shape.rows}×{shape.columns} | {shape.layers} | {shape.flop:.2e} | {panel:.2e} | {flush:.2e} |")
    print(f"| ResNet-50 | 54 | {total[0]:.3e} | {total[1]:.2e} | {total[2]:.2e} |\n")
    print("| sweep | dtype | tile | warps | registers | stack bytes | shared bytes |\n|---|---|---|---|---|---|---|")
    for name, dtype, columns in [
        ("unstructured", torch.float32, 1024),
        ("quantize", torch.float32, 1024),
        ("quantize with zeros", torch.float32, 1024),
        ("N:M with zeros", torch.float32, 1024),
        ("unstructured", torch.float32, 128),
        ("quantize with zeros", torch.float64, 512),
    ]:
        warps = columns * dtype.itemsize // 512
        cells = (name, str(dtype).removeprefix("torch."), columns, warps, *resources(name, dtype, columns, warps))
        print("| " + " | ".join(map(str, cells)) + " |")


def resources(name: str, dtype: torch.dtype, columns: int, warps: int) -> tuple[int, int, int]:
    """Registers per thread, stack and shared bytes of the panel kernel, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        panel_source(name, "*fp32" if dtype == torch.float32 else "*fp64", columns),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in report.stdout.splitlines() if "REG:" in line)
    found = dict(field.split(":") for field in line.split() if ":" in field)
    return int(found["REG"]), int(found["STACK"]), int(found["SHARED"])


def panel_source(name: str, floats: str, columns: int) -> Any:
    """The panel kernel as a launch would specialise it to wide aligned matrices."""
    from triton.compiler import ASTSource

    from lightning_obc.kernels.obs_sweep.triton_kernels import Lines, Sizes, Working, panel_kernel

    none, quantize, zeros, groups = "constexpr", "quantize" in name, "zeros" in name, "N:M" in name
    grid = floats if quantize else none
    keep, group, codes = "*u8" if zeros else none, "*i64" if groups else none, "*u8" if quantize else none
    types: dict[str, Any] = {
        "lines": Lines(grid, grid, keep, group, "*i32", floats, "*i32", codes),  # type: ignore[arg-type]
        "working": Working(
            "*i64",
            "*i64",
            "*i32",
            floats,
            floats,
            "*i32",
            floats,
            group,
            floats,  # type: ignore[arg-type]
        ),
        "sizes": Sizes("i64", *["i32"] * 6),  # type: ignore[arg-type]
        "matrix": floats,
        **dict.fromkeys(("rows", "size", "steps", "made"), "i32"),
    }
    values: dict[str, Any] = {"MAX_CODE": 15, "FAR": 0.500005, "WORN_RATIO": 150.0}
    values |= {"ROWS": 1, "COLS": columns, "DEPTH": 8}
    signature = {arg: types.get(arg, none) for arg in panel_kernel.arg_names}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, (arg, kind) in enumerate(signature.items()):
        if kind == none:
            constants[(i,)] = values[arg]
        elif isinstance(kind, tuple):
            constants |= {(i, j): None for j, part in enumerate(kind) if part == none}
            last = Sizes._fields.index("columns") if arg == "sizes" else len(kind) - 1
            aligned |= {(i, j): [["tt.divisibility", 16]] for j, part in enumerate(kind) if part != none and j <= last}
        elif kind == floats:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=panel_kernel, signature=signature, constexprs=constants, attrs=aligned)


# ------------------------------------------------------------------------------------------------- problems
def problem_of(rows: int, columns: int, device: str) -> SweepInput:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(columns, 2 * columns + 7, generator=generator, device=device)
    hessian = (2 * x @ x.mT / x.shape[1]).double()[None]
    weight = torch.randn(1, rows, columns, generator=generator, device=device)
    inverse = safe_inverse(hessian, 0.01)
    return SweepInput(weight, inverse.inverse.float(), inverse.damped_hessian)


def prune(problem: SweepInput, backend: str = "triton") -> SweepOutput:
    return sweep_prune(problem, backend=backend)


def two_of_four(problem: SweepInput, backend: str = "triton") -> SweepOutput:
    columns, device = problem.weight.shape[2], problem.weight.device
    group = torch.arange(columns, device=device) // 4
    members = torch.bincount(group)
    return sweep_prune(problem, groups=NMGroups(group, members // 2), backend=backend)


def quantize(problem: SweepInput, backend: str = "triton") -> SweepOutput:
    scale = problem.weight.abs().amax(2, keepdim=True) * 0.8 / 7.5
    grid = GridInput(scale.expand_as(problem.weight), torch.full_like(problem.weight, 8.0), 15)
    return sweep_quantize(problem, grid, backend=backend)


SWEEPS: dict[str, Callable[..., SweepOutput]] = {
    "unstructured": prune,
    "2:4": two_of_four,
    "quantize, 4 bits": quantize,
}


def parity_failures() -> list[str]:
    """Sweeps that disagree with the oracle on a ragged layer that has several panels and tiles."""
    problem = problem_of(6, 1187, "cuda")
    failures = []
    for name, sweep in SWEEPS.items():
        got, oracle = sweep(problem), sweep(problem, backend="naive")
        same = (got.order == oracle.order).double().mean().item()
        loss = (got.losses.double().sum(-1) / oracle.losses.double().sum(-1) - 1).abs().max().item()
        if got.any_broken or same < 0.99 or loss > 1e-5:
            failures.append(f"{name}: {same:.4f} of all steps equal, summed losses differ by {loss:.1e}")
    return failures


# --------------------------------------------------------------------------------------------------- timing
def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of ``repeats`` runs after a first that compiles."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def rank_one_seconds(problem: SweepInput, rows: int, steps: int, repeats: int) -> float:
    """Time of the whole layer by one full rank-1 update of every row's ``G`` per weight.

    The update costs the same at every step and for every batch of rows, so ``rows`` rows and ``steps`` steps are timed
    and scaled up.
    """
    total, columns = problem.weight.shape[1:]

    def work() -> Tensor:
        inverse = problem.inverse.expand(rows, -1, -1).clone()
        weight, alive = problem.weight[0, :rows].clone(), torch.ones(rows, columns, dtype=torch.bool, device="cuda")
        for _ in range(steps):
            diagonal = inverse.diagonal(dim1=1, dim2=2)
            pivot = torch.where(alive, weight.square() / diagonal, torch.inf).argmin(1, keepdim=True)
            v = inverse.gather(1, pivot[:, :, None].expand(-1, -1, columns))[:, 0]
            v = v / diagonal.gather(1, pivot).sqrt()
            weight -= weight.gather(1, pivot) / v.gather(1, pivot) * v
            inverse.baddbmm_(v[:, :, None], v[:, None, :], alpha=-1)
            alive.scatter_(1, pivot, False)
        return weight

    return seconds(work, repeats) * total / rows * columns / steps


def matrix_speed() -> float:
    """Float32 flop per second of a large product without TF32."""
    a = torch.randn(8192, 8192, device="cuda")
    with exact_products("cuda"):
        return 2 * 8192.0**3 / seconds(lambda: a @ a, 5)


def shape_times(shape: Shape, repeats: int) -> tuple[dict[str, float], float]:
    """Seconds of every sweep of one layer, and of the rank-1 implementation; peak bytes of the sweeps."""
    problem = problem_of(shape.rows, shape.columns, "cuda")
    torch.cuda.reset_peak_memory_stats()
    times = {name: seconds(partial(sweep, problem), repeats) for name, sweep in SWEEPS.items()}
    peak = torch.cuda.max_memory_allocated()
    fitting = max(1, min(shape.rows, int(8e9 / (4 * shape.columns**2))))
    times["rank-1"] = rank_one_seconds(problem, fitting, min(64, shape.columns), repeats)
    return times, peak


def layer_table(speed: float, repeats: int) -> list[str]:
    """One line per shape, and the network's sums."""
    heads = ["layer", "layers", *(f"{name} [s]" for name in [*SWEEPS, "rank-1"]), "ratio", "share", "peak [GiB]"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    sums = dict.fromkeys([*SWEEPS, "rank-1"], 0.0)
    for shape in RESNET50:
        times, peak = shape_times(shape, repeats)
        for name, value in times.items():
            sums[name] += shape.layers * value
        first = times["unstructured"]
        cells = [f"{shape.rows}×{shape.columns}", str(shape.layers), *(f"{t:.3f}" for t in times.values())]
        cells += [f"{times['rank-1'] / first:.0f}×", f"{shape.flop / shape.layers / speed / first:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{peak / 2**30:.1f}"]) + " |")
    ratio = sums["rank-1"] / sums["unstructured"]
    totals = " | ".join(f"{value:.2f}" for value in sums.values())
    return [*lines, f"| ResNet-50 | {sum(s.layers for s in RESNET50)} | {totals} | {ratio:.0f}× | | |"]


def report(repeats: int) -> str:
    """All of ResNet-50's layers, then the wide quantization."""
    speed = matrix_speed()
    table = layer_table(speed, repeats)
    problem = problem_of(WIDE.rows, WIDE.columns, "cuda")
    torch.cuda.reset_peak_memory_stats()
    wide = seconds(lambda: quantize(problem), 1)
    peak = torch.cuda.max_memory_allocated() / 2**30
    lines = [
        "# The sweep on a GPU",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"float32 matrix products without TF32: {speed / 1e12:.1f} Tflop/s. Medians of {repeats}.",
        "",
        *table,
        "",
        f"4096×4096 quantized to 4 bits: {wide:.2f} s, peak {peak:.1f} GiB.",
        "",
        "*rank-1*: one full rank-1 update per weight, on this GPU, scaled up from a part; *ratio*: rank-1 over "
        "unstructured; *share*: time of ⅔·R·d³ flop at the matrix speed above, over unstructured.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="bytes, flop and compiled resources, without a device")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.plan:
        print_plan()
        return 0
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none here; --plan shows the launch plan without one.")
        return 1
    failures = parity_failures()
    if failures:
        print("Not timed, because parity fails:\n" + "\n".join(failures), file=sys.stderr)
        return 1
    text = report(options.repeats)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
