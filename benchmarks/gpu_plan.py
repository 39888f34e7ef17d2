"""The launch plan of the sweep on a GPU: bytes, flop, and what the kernels compile to. No device is needed.

python benchmarks/gpu_plan.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch


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


# Sweep, dtype, slots of a tile, and ``c`` of a sweep over blocks.
KERNELS: list[tuple[str, torch.dtype, int, int]] = [
    ("unstructured", torch.float32, 1024, 0),
    ("quantize with zeros", torch.float32, 1024, 0),
    ("N:M with zeros", torch.float32, 1024, 0),
    ("blocks of 4", torch.float32, 512, 4),
]
MORE_KERNELS: list[tuple[str, torch.dtype, int, int]] = [
    ("quantize", torch.float32, 1024, 0),
    ("unstructured", torch.float32, 128, 0),
    ("quantize with zeros", torch.float64, 512, 0),
    ("blocks of 2", torch.float32, 512, 2),
    ("blocks of 8", torch.float32, 256, 8),
    ("blocks of 4", torch.float64, 256, 4),
]


def traffic(shape: Shape, block: int = 1) -> tuple[float, float]:
    """Bytes to and from memory, panels and flushes, if no cache helped: float32, all columns, ``block`` at a time."""
    from lightning_obc.kernels.obs_sweep.triton_chunk import Tuning

    tuning, size, panels, flushes = Tuning(), shape.columns, 0.0, 0.0
    while size > 0:
        steps = max(1, tuning.panel(size) // block)
        # The panel's earlier columns are read once a step. Besides: lines of G, new columns, diagonal blocks, state.
        vectors = 8 if block == 1 else 5 * block + 5
        panels += 4 * size * (block * steps * (steps - 1) / 2 + vectors * steps)
        size -= steps * block
        flushes += 2 * 4 * float(max(size, 0)) ** 2
    return shape.layers * shape.rows * panels, shape.layers * shape.rows * flushes


def print_plan(kernels: list[tuple[str, torch.dtype, int, int]]) -> None:
    """Work of every ResNet-50 shape and of a wide layer, then what the kernels compile to."""
    print("| R×d | layers | flop | panel bytes | flush bytes | panel bytes, blocks of 4 |\n" + "|---" * 6 + "|")
    total = [0.0, 0.0, 0.0, 0.0]
    for shape in [*RESNET50, WIDE]:
        counts = (shape.flop, *traffic(shape), traffic(shape, 4)[0])
        if shape is not WIDE:
            total = [a + b for a, b in zip(total, counts, strict=True)]
        print(f"| {shape.rows}×{shape.columns} | {shape.layers} | " + " | ".join(f"{x:.2e}" for x in counts) + " |")
    print("| ResNet-50 | 54 | " + " | ".join(f"{x:.3e}" for x in total) + " |\n")
    print("| sweep | dtype | tile | warps | registers | stack bytes | shared bytes |\n" + "|---" * 7 + "|")
    for name, dtype, columns, block in kernels:
        warps = columns * dtype.itemsize // 512
        found = resources(panel_source(name, dtype, columns, block), warps)
        print("| " + " | ".join(map(str, (name, str(dtype).removeprefix("torch."), columns, warps, *found))) + " |")


def resources(source: Any, warps: int) -> tuple[int, int, int]:
    """Registers per thread, stack and shared bytes of a kernel, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in report.stdout.splitlines() if "REG:" in line)
    found = dict(field.split(":") for field in line.split() if ":" in field)
    return int(found["REG"]), int(found["STACK"]), int(found["SHARED"])


def panel_source(name: str, dtype: torch.dtype, columns: int, block: int) -> Any:
    """The panel kernel as a launch would specialise it to wide aligned matrices."""
    import triton
    from triton.compiler import ASTSource

    from lightning_obc.kernels.obs_sweep.triton_block_kernels import BlockSizes, block_panel_kernel
    from lightning_obc.kernels.obs_sweep.triton_kernels import Lines, Sizes, Working, panel_kernel

    none, floats = "constexpr", "*fp32" if dtype == torch.float32 else "*fp64"
    quantize, zeros, groups = "quantize" in name, "zeros" in name, "N:M" in name
    grid = floats if quantize else none
    keep, group, codes = "*u8" if zeros else none, "*i64" if groups else none, "*u8" if quantize else none
    kernel, sizes = (block_panel_kernel, BlockSizes) if block else (panel_kernel, Sizes)
    state: Any = ("*i64", "*i64", "*i32", floats, floats, "*i32", floats, group, floats)
    rows: Any = (grid, grid, keep, group, "*i32", floats, "*i32", codes)
    types: dict[str, Any] = {
        "lines": Lines(*rows),
        "working": Working(*state),
        "sizes": sizes("i64", *["i32"] * 6),  # type: ignore[arg-type]
        "matrix": floats,
        **dict.fromkeys(("rows", "size", "steps", "made"), "i32"),
    }
    filled = triton.next_power_of_2(max(1, block))
    values: dict[str, Any] = {"MAX_CODE": 15, "FAR": 0.500005, "WORN_RATIO": 30.0, "SIZE": block, "C": filled}
    values |= {"ROWS": 1, "COLS": columns, "DEPTH": 8 // filled, "PLACES": columns * dtype.itemsize // 16}
    return _specialised(ASTSource, kernel, {arg: types.get(arg, none) for arg in kernel.arg_names}, values, floats)


def _specialised(source: Any, kernel: Any, signature: dict[str, Any], values: dict[str, Any], floats: str) -> Any:
    from lightning_obc.kernels.obs_sweep.triton_block_kernels import BlockSizes

    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, (arg, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            constants[(i,)] = values[arg]
        elif isinstance(kind, tuple):
            constants |= {(i, j): None for j, part in enumerate(kind) if part == "constexpr"}
            # Of the sizes, strides and the columns of a wide layer are multiples of 16.
            last = len(kind) - 1 if arg != "sizes" else 3 if isinstance(kind, BlockSizes) else 4
            parts = [j for j, part in enumerate(kind) if part != "constexpr" and j <= last]
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in parts}
        elif kind == floats:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)


if __name__ == "__main__":
    print_plan(KERNELS if "--few" in sys.argv else KERNELS + MORE_KERNELS)
