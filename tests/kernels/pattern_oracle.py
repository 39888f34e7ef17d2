"""Every pattern by the book: float64, one row and one step at a time, the inverse of what is left computed anew.

Nothing here comes from the package but the specs. ``support`` is what may still be non-zero: weights that are zero at
the start are no part of it, so that no step sees them and none gives them a value.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_obc.specs import NM, Block, Pattern, Structured, Unstructured

Costs = tuple[list[int], list[float]]


def removal(row: Tensor, hessian: Tensor, support: Tensor, columns: Sequence[int]) -> tuple[float, Tensor]:
    """What it costs to take ``columns`` out of a row, and the row afterwards."""
    out = [column for column in columns if support[column]]
    if not out:
        return 0.0, row
    left = support.nonzero().flatten()
    inverse = torch.linalg.inv(hessian[left][:, left])
    here = torch.isin(left, torch.tensor(out))
    step = torch.linalg.solve(inverse[here][:, here], row[left][here])
    moved = row.clone()
    moved[left] -= inverse[:, here] @ step
    moved[out] = 0.0
    return float(row[left][here] @ step) / 2, moved


def row_order(
    row: Tensor, hessian: Tensor, units: list[list[int]], wanted: Callable[[list[int], Tensor], bool]
) -> Costs:
    """Units of a row in the order in which they go, cheapest first, as long as ``wanted(unit, support)``."""
    support, order, losses = row != 0, [], []
    while True:
        options = [index for index, unit in enumerate(units) if index not in order and wanted(unit, support)]
        if not options:
            return order, losses
        priced = [(removal(row, hessian, support, units[index])[0], index) for index in options]
        # Units of zeros come first, whatever rounding makes of the costs of others.
        empty = [index for index in options if not bool(support[units[index]].any())]
        cost, best = (0.0, empty[0]) if empty else min(priced)
        _, row = removal(row, hessian, support, units[best])
        support[units[best]] = False
        order.append(best)
        losses.append(cost)


def spread(orders: list[Costs], zeros: int) -> list[int]:
    """Steps of each row: zeros that are there already, then again and again the smallest next loss (algorithm 2)."""
    counts = [sum(loss == 0.0 for loss in losses) for _, losses in orders]
    queue = [
        (losses[count], row)
        for row, (count, (_, losses)) in enumerate(zip(counts, orders, strict=True))
        if count < len(losses)
    ]
    heapq.heapify(queue)
    while sum(counts) < zeros:
        _, row = heapq.heappop(queue)
        counts[row] += 1
        if counts[row] < len(orders[row][1]):
            heapq.heappush(queue, (orders[row][1][counts[row]], row))
    return counts


def mask_of(pattern: Pattern, weight: Tensor, hessian: Tensor, channels: int) -> Tensor:
    """Keep-mask ``[g, R, d]`` of ``weight [g, R, d]`` under the damped ``hessian [g, d, d]``."""
    groups, rows, columns = weight.shape
    if isinstance(pattern, Structured):
        return structured_mask(pattern, weight, hessian, channels)
    size = pattern.size if isinstance(pattern, Block) else 1
    units = [list(range(start, start + size)) for start in range(0, columns, size)]
    mask = weight != 0
    places = [(g, r) for g in range(groups) for r in range(rows)]
    if isinstance(pattern, NM):
        for g, r in places:
            order, _ = row_order(weight[g, r], hessian[g], units, open_groups(pattern))
            mask[g, r, order] = False
        return mask
    assert isinstance(pattern, (Unstructured, Block))
    orders = [row_order(weight[g, r], hessian[g], units, lambda unit, support: True) for g, r in places]
    counts = spread(orders, math.ceil(round(pattern.sparsity * len(places) * len(units), 6)))
    for (g, r), (order, _), count in zip(places, orders, counts, strict=True):
        for index in order[:count]:
            mask[g, r, units[index]] = False
    return mask


def open_groups(pattern: NM) -> Callable[[list[int], Tensor], bool]:
    """Single columns that are not zero, of groups that still have too many of those."""

    def wanted(unit: list[int], support: Tensor) -> bool:
        start = unit[0] // pattern.m * pattern.m
        return bool(support[unit[0]]) and int(support[start : start + pattern.m].sum()) > pattern.n

    return wanted


def structured_mask(pattern: Structured, weight: Tensor, hessian: Tensor, channels: int) -> Tensor:
    """Channels of all rows and positions together, the costs of all rows added."""
    groups, rows, columns = weight.shape
    current, support = weight.clone(), weight != 0
    left = [(g, c) for g in range(groups) for c in range(channels)]
    for _ in range(math.ceil(round(pattern.sparsity * len(left), 6))):
        prices = []
        for g, c in left:
            members = list(range(c, columns, channels))
            cost = sum(removal(current[g, r], hessian[g], support[g, r], members)[0] for r in range(rows))
            prices.append((cost, (g, c)))
        _, (g, c) = min(prices)
        members = list(range(c, columns, channels))
        for r in range(rows):
            _, current[g, r] = removal(current[g, r], hessian[g], support[g, r], members)
        support[g][:, members] = False
        left.remove((g, c))
    return support


def best_on(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Least-squares optimum of every row on its mask."""
    solved = torch.zeros_like(weight)
    for g, r in torch.cartesian_prod(torch.arange(weight.shape[0]), torch.arange(weight.shape[1])).tolist():
        kept = mask[g, r]
        if bool(kept.any()):
            right = (hessian[g] @ weight[g, r])[kept]
            solved[g, r, kept] = torch.linalg.solve(hessian[g][kept][:, kept], right)
    return solved


def codes_of(weight: Tensor, hessian: Tensor, keep: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes ``[g, R, d]`` of the greedy order; scales and zero points ``[g, R, d]``."""
    codes = zero.clone()
    for g, r in torch.cartesian_prod(torch.arange(weight.shape[0]), torch.arange(weight.shape[1])).tolist():
        codes[g, r] = row_codes(weight[g, r], hessian[g], keep[g, r], scale[g, r], zero[g, r], top)
    return codes.to(torch.uint8)


def row_codes(row: Tensor, hessian: Tensor, keep: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """One row; columns outside ``keep`` stay on the zero point and take no part."""
    row, codes, support = row.clone(), zero.clone(), keep.clone()
    while bool(support.any()):
        left = support.nonzero().flatten()
        inverse = torch.linalg.inv(hessian[left][:, left])
        free = torch.round(row[left] / scale[left]) + zero[left]
        code = free.clamp(0, top)
        error = row[left] - (code - zero[left]) * scale[left]
        outlier = (free != code) & (error.abs() > scale[left] / 2 * (1 + 1e-5))
        if bool(outlier.any()):
            here = int(torch.where(outlier, error.square(), -1.0).argmax())
        else:
            here = int((error.square() / inverse.diagonal()).argmin())
        column = int(left[here])
        row[left] -= inverse[:, here] * error[here] / inverse[here, here]
        codes[column], support[column] = code[here], False
    return codes
