"""What a sweep costs."""

from __future__ import annotations


def sweep_flops(groups: int, rows: int, columns: int) -> float:
    """⅔·R·d³ per problem, the cost of a full elimination."""
    return 2 / 3 * groups * rows * float(columns) ** 3
