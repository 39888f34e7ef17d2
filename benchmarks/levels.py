"""Levels of one layer from one elimination against the same levels solved apart.

    python -m benchmarks.levels --out benchmarks/results

For each layer and kind of pattern the database's way (one inverse, one elimination, losses of all levels from one
factorisation) and ``obs.prune`` level by level run in turn; figures are medians. Nothing is printed unless the masks of
both are equal, and their losses to 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe, seconds
from lightning_obc import obs
from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.record import LayerRecord
from lightning_obc.allocation.solve import Recipe, new_record, solve_levels_
from lightning_obc.files import write_whole
from lightning_obc.specs import Block, Pattern, Structured, Unstructured

SPARSITIES = tuple(1 - 0.8**step for step in range(1, 11))
KINDS: dict[str, Callable[[float], Pattern]] = {
    "unstructured": Unstructured,
    "blocks of 4": lambda sparsity: Block(4, sparsity),
    "structured": Structured,
}
# Rows, input channels, kernel positions.
CASES = (
    ((64, 64, 9), "unstructured"),
    ((64, 64, 9), "blocks of 4"),
    ((64, 64, 9), "structured"),
    ((128, 128, 9), "structured"),
)
DAMPING = 0.01


def layer(rows: int, channels: int, positions: int) -> tuple[Tensor, Tensor]:
    """``[1, R, d]`` and ``[1, d, d]`` of rectified, correlated inputs."""
    columns = channels * positions
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(columns, 2 * columns, generator=generator, dtype=torch.float64)
    x = torch.relu(x + mix @ x)
    return torch.randn(1, rows, columns, generator=generator), (2 * x @ x.T / (2 * columns))[None]


def compare(rows: int, channels: int, positions: int, kind: str, repeats: int) -> str:
    """One line of the table.

    Raises:
        SystemExit: The levels differ.
    """
    weight, hessian = layer(rows, channels, positions)
    levels = [Level(KINDS[kind](sparsity)) for sparsity in SPARSITIES]

    def together() -> LayerRecord:
        record = new_record(weight, hessian, DAMPING)
        solve_levels_(record, weight, hessian, channels, levels, Recipe(damping=DAMPING))
        return record

    def apart() -> list[obs.LayerSolution]:
        patterns = [level.pattern for level in levels if level.pattern is not None]
        return [obs.prune(weight, hessian, pattern, channels=channels, damping=DAMPING) for pattern in patterns]

    check(together(), levels, apart())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(seconds(together, time.process_time))
        times[1].append(seconds(apart, time.process_time))
    one, each = (statistics.median(part) for part in times)
    return f"| {rows}×{channels * positions} | {kind} | {len(levels)} | {one:.3f} | {each:.3f} | {each / one:.1f} |"


def check(record: LayerRecord, levels: Sequence[Level], alone: Sequence[obs.LayerSolution]) -> None:
    """Refuse to go on unless both ways found the same."""
    for level, solution in zip(levels, alone, strict=True):
        stored = record.levels[level.name]
        same = torch.equal(record.mask(level), solution.mask)
        if not same or abs(stored.loss - solution.loss) > 1e-4 * solution.loss:
            raise SystemExit(f"parity is red: {level.name} differs, loss {stored.loss:.6g} and {solution.loss:.6g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    lines = [
        "# Levels of one layer: one elimination against one for each level",
        "",
        f"Machine: {describe()}.",
        f"{len(SPARSITIES)} levels, densities 0.8, 0.64, … 0.107; both ways in turn, medians of {options.repeats}, "
        "in seconds of processor time. Masks equal, losses to 1e-4.",
        "",
        "| layer | pattern | levels | together, s | apart, s | apart ÷ together |",
        "|---|---|---|---|---|---|",
    ]
    lines += [compare(*shape, kind, options.repeats) for shape, kind in CASES]
    page = "\n".join(lines) + "\n"
    write_whole(options.out / "levels.md", lambda target: target.write_text(page))
    print(page)


if __name__ == "__main__":
    main()
