"""Working memory of the compiled sweep: one row per thread, whatever the rows; a budget takes threads away."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from sweep_cases import BLOCKS, MODES, Mode, in_dtype, make_problem

COLUMNS = 384
# G of the problem and of one row in flight, a panel, and the float64 parts that only a restart touches, in bytes.
ROW = COLUMNS**2 // 2 * (4 + 8) + 128 * COLUMNS * 12
SHARED = COLUMNS**2 // 2 * 4
MODES_HERE = [MODES[0], MODES[1], MODES[5], BLOCKS[0]]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def peak(mode: Mode, rows: int, budget: int) -> int:
    """Bytes that NumPy held at once; the tensors that come back are torch's and do not count."""
    problem = in_dtype(make_problem(1, rows, COLUMNS, damping=1e-2), torch.float32)
    mode.run(problem, "numba", memory_budget=budget)
    tracemalloc.start()
    try:
        mode.run(problem, "numba", memory_budget=budget)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", MODES_HERE, ids=lambda mode: mode.name)
def test_memory_does_not_grow_with_rows_and_keeps_the_budget(mode: Mode) -> None:
    assert peak(mode, 32, 10**9) <= SHARED + 2 * 1.3 * ROW
    assert peak(mode, 32, 1) <= SHARED + 1.3 * ROW
    assert 32 * COLUMNS**2 // 2 * 4 > SHARED + 2 * 1.3 * ROW, "a copy of G per row would go unseen"
