"""Spreading zeros over rows, against a literal priority queue."""

from __future__ import annotations

import heapq

import pytest
import torch

from lightning_obc.errors import SpecError
from lightning_obc.obs.select import masks_from_order, row_counts, zeros_for


def heap_reference(losses: list[list[float]], zeros: int) -> list[int]:
    """Repeatedly take the smallest next loss among rows; ties to the lower row."""
    counts = [0] * len(losses)
    queue = [(row[0], index) for index, row in enumerate(losses)]
    heapq.heapify(queue)
    for _ in range(zeros):
        _, index = heapq.heappop(queue)
        counts[index] += 1
        if counts[index] < len(losses[index]):
            heapq.heappush(queue, (losses[index][counts[index]], index))
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_heap_is_the_priority_queue(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values make ties, within rows and between them.
    losses = torch.randint(0, 6, (5, 9), generator=generator).double()
    for zeros in range(46):
        assert row_counts(losses, zeros, "heap").tolist() == heap_reference(losses.tolist(), zeros)


def test_sorted_counts_the_smallest_losses_anywhere() -> None:
    losses = torch.tensor([[5.0, 1.0, 1.0], [2.0, 3.0, 4.0]])
    # The non-monotone first row: the queue must pay 5 before it reaches its cheap steps, sorting need not.
    assert row_counts(losses, 2, "sorted").tolist() == [2, 0]
    assert row_counts(losses, 2, "heap").tolist() == [0, 2]


def test_hull_minimises_the_total_at_its_breakpoints() -> None:
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(3, 5, generator=generator).double()
    totals = torch.nn.functional.pad(losses.cumsum(1), (1, 0))

    def cost(counts: list[int]) -> float:
        return sum(float(totals[row, count]) for row, count in enumerate(counts))

    grid = [[a, b, c] for a in range(6) for b in range(6) for c in range(6)]
    for price in (0.05, 0.2, 0.4, 0.6, 0.9):
        best = min(grid, key=lambda counts: cost(counts) - price * sum(counts))
        counts = row_counts(losses, sum(best), "hull").tolist()
        assert cost(counts) == pytest.approx(cost(best))


def test_hull_takes_the_zeros_of_a_row_that_has_nothing_else() -> None:
    losses = torch.tensor([[-torch.inf, -torch.inf, -torch.inf], [-torch.inf, 1.0, 2.0]])
    assert row_counts(losses, 4, "hull").tolist() == [3, 1]
    assert row_counts(losses, 5, "hull").tolist() == [3, 2]


def test_hull_is_nested() -> None:
    losses = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    previous = torch.zeros(4, dtype=torch.int64)
    for zeros in range(33):
        counts = row_counts(losses, zeros, "hull")
        assert counts.sum() == zeros
        assert bool((counts >= previous).all())
        previous = counts


def test_fixed_steps_come_first() -> None:
    losses = torch.tensor([[9.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    for selection in ("heap", "sorted", "hull"):
        assert row_counts(losses, 3, selection, torch.tensor([2, 0])).tolist() == [2, 1]
        assert row_counts(losses, 1, selection, torch.tensor([2, 0])).tolist() == [2, 0]


def test_masks_follow_the_order() -> None:
    order = torch.tensor([[2, 0, 1], [1, 2, 0]], dtype=torch.int32)
    mask = masks_from_order(order, torch.tensor([2, 0]))
    assert mask.tolist() == [[False, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("sparsity", "weights", "zeros"), [(0.9, 1000, 900), (0.5, 3, 2), (0.0, 7, 0), (0.999, 10, 10)]
)
def test_zeros_for(sparsity: float, weights: int, zeros: int) -> None:
    assert zeros_for(sparsity, weights) == zeros


def test_impossible_requests() -> None:
    with pytest.raises(SpecError, match="Unknown selection"):
        row_counts(torch.rand(2, 2), 1, "greedy")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="More zeros"):
        row_counts(torch.tensor([[1.0, torch.inf]]), 2, "heap")
