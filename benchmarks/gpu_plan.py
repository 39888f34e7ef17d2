"""The launch plan of the sweep on a GPU: bytes, flop, and what the kernels compile to. No device is needed.

    python benchmarks/gpu_plan.py > benchmarks/results/gpu_plan.md

The status is 1 where a kernel asks for more shared memory than a program can have.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gpu_launches import Launch


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


# Input channels × kernel positions of the network's convolutions, and how many have them.
STRUCTURED = [
    (3, 49, 1),
    (64, 1, 5),
    (64, 9, 3),
    (128, 1, 4),
    (128, 9, 4),
    (256, 1, 9),
    (256, 9, 6),
    (512, 1, 8),
    (512, 9, 3),
    (1024, 1, 7),
    (2048, 1, 3),
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


def channel_work(channels: int, positions: int) -> tuple[float, float, int]:
    """Flop and bytes of a whole sweep over channels in float64 under one inverse, if no cache helped, and its launches.

    Besides what lines and products cost, every program reads the block that leaves.
    """
    from lightning_obc.kernels.obs_sweep.triton_channels import LINES, _tile

    per_panel, alive, flop, moved, launches = max(1, LINES // positions), channels, 0.0, 0.0, 1
    while alive > 0:
        steps, columns = min(per_panel, alive), alive * positions
        programs = -(-alive // _tile(positions)["TILE"])
        for step in range(steps):
            # Of each new line: the panel's earlier ones, v of G and u of A; blocks, and their costs.
            lines = step * positions
            flop += columns * positions * (6 * lines + 6 * positions) + columns * positions * (8 * positions)
            moved += 8 * (2 * lines * columns + 6 * positions * columns + 4 * positions * columns)
            moved += 8 * programs * 4 * positions**2
        alive -= steps
        left = alive * positions
        # Gathered twice, and three products that read and write.
        flop += 6 * float(left) ** 2 * steps * positions
        moved += 32 * float(left) ** 2 if left else 0.0
        launches += 2 * steps
    return flop, moved, launches


def print_work() -> None:
    """Work of every ResNet-50 shape and of a wide layer."""
    print("| R×d | layers | flop | panel bytes | flush bytes | panel bytes, blocks of 4 |\n" + "|---" * 6 + "|")
    total = [0.0, 0.0, 0.0, 0.0]
    for shape in [*RESNET50, WIDE]:
        counts = (shape.flop, *traffic(shape), traffic(shape, 4)[0])
        if shape is not WIDE:
            total = [a + b for a, b in zip(total, counts, strict=True)]
        print(f"| {shape.rows}×{shape.columns} | {shape.layers} | " + " | ".join(f"{x:.2e}" for x in counts) + " |")
    print("| ResNet-50 | 54 | " + " | ".join(f"{x:.3e}" for x in total) + " |\n")
    print("| structured: channels × positions | layers | flop, float64 | bytes | launches |\n" + "|---" * 5 + "|")
    sums, layers = [0.0, 0.0, 0.0], 0
    for channels, positions, count in [*STRUCTURED, (4096, 1, 0)]:
        flop, moved, launches = channel_work(channels, positions)
        print(f"| {channels}×{positions} | {count or 1} | {flop:.2e} | {moved:.2e} | {launches} |")
        sums = [a + count * b for a, b in zip(sums, (flop, moved, launches), strict=True)]
        layers += count
    print(f"| ResNet-50 | {layers} | {sums[0]:.2e} | {sums[1]:.2e} | {sums[2]:.0f} |\n")


def recorded(few: bool) -> list[Launch]:
    """Every kernel as the launches specialise it that these sweeps make; with ``few``, the first of each kernel."""
    from functools import partial

    import gpu_launches as gpu

    found: list[Launch] = []
    # Compilation is the same for any capability; what comes of it is not.
    with gpu.recording(90) as record:
        if few:
            found += record("2:4 with zeros", 1100, partial(gpu.SWEEPS["2:4 with zeros"], 1100))
            found += record("blocks of 4", 512, partial(gpu.blocks, 512))
            found += record("structured, 9 positions", 576, partial(gpu.channels, 576, 9))
            first = {launch.kernel: launch for launch in reversed(found)}
            return list(reversed(first.values()))
        widths = sorted({shape.columns for shape in [*RESNET50, WIDE]}, reverse=True)
        for name, sweep in gpu.SWEEPS.items():
            for columns in widths:
                found += record(name, columns, partial(sweep, columns))
        for name, columns, sweep in gpu.OTHERS:
            found += record(name, columns, partial(sweep, columns))
        for positions, sizes in gpu.STRUCTURED.items():
            for columns in sizes:
                name = f"structured, {positions} positions"
                found += record(name, columns, partial(gpu.channels, columns, positions))
            found += record(f"{name}, inverses of rows", columns, partial(gpu.channels, columns, positions, True))
    return found


def print_kernels(few: bool, capabilities: tuple[int, ...]) -> bool:
    """What all kernels compile to; False where one has more shared memory than there is.

    Variants of a kernel that differ in alignment alone share a line, with the largest of their numbers.
    """
    import gpu_launches as gpu
    import triton

    names = [f"{capability / 10:.1f}" for capability in capabilities]
    print(f"Triton {triton.__version__}: registers, bytes spilled, bytes of shared memory, by compute capability.\n")
    print("| kernel | sweep | d | constants | warps | " + " | ".join(names) + " |")
    print("|---" * (5 + len(names)) + "|")
    lines: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in recorded(few):
        meta = ", ".join(f"{k} {v}" for k, v in launch.meta.items() if k.isupper() and k in SHOWN)
        # What moves is compiled the same for every sweep.
        sweep = "all rows" if launch.kernel in ("move_kernel", "choose_kernel") else launch.sweep
        lines.setdefault((launch.kernel, sweep, meta, launch.warps), []).append(launch)
    good = True
    for (kernel, sweep, meta, warps), launches in lines.items():
        cells = []
        for capability in capabilities:
            found = [gpu.resources(launch, capability) for launch in launches]
            most = [max(column) for column in zip(*found, strict=True)]
            good &= most[2] <= gpu.MOST_SHARED
            cells.append(f"{most[0]}, {most[1]}, {most[2]}")
        columns = max(launch.columns for launch in launches)
        line = [kernel.removesuffix("_kernel"), sweep, str(columns), meta, str(warps), *cells]
        print("| " + " | ".join(line) + " |", flush=True)
    return good


# Constants of a launch that a line of the table shows.
SHOWN = ("COLS", "C", "PLACES", "TILE", "SIZE", "MIRROR")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true", help="one specialisation of each kernel")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[90, 80], help="of the devices to compile for")
    args = parser.parse_args(arguments)
    if not args.few:
        print_work()
    return 0 if print_kernels(args.few, tuple(args.capabilities)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
