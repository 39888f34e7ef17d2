"""Spread the zeros of an unstructured pattern over the rows of a layer.

The input is the table of step losses of a full sweep, ``[rows, d]``, each row in its own elimination order. The
output is how many steps of that order every row takes. All rules are deterministic: ties go to the lower row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_obc.errors import SpecError
from lightning_obc.specs import Selection


def zeros_for(sparsity: float, weights: int) -> int:
    """``ceil(sparsity · weights)``, immune to the last bit of the product."""
    return min(weights, math.ceil(round(sparsity * weights, 6)))


def row_counts(losses: Tensor, zeros: int, selection: Selection = "heap", fixed: Tensor | None = None) -> Tensor:
    """How many elimination steps each row takes so that ``zeros`` weights go in total.

    Args:
        losses: ``[rows, steps]``; ``+inf`` marks steps that a row cannot take.
        zeros: Number of weights to remove in the layer.
        selection: ``"heap"``, the smallest *next* loss among rows again and again (paper, algorithm 2);
            ``"sorted"``, the smallest losses anywhere, counted per row (the released code); ``"hull"``, the same on
            each row's losses after pooling adjacent violators, which is optimal for the Lagrangian.
        fixed: ``[rows]`` steps each row takes in any case (weights that are zero already).

    Returns:
        ``[rows]`` int64 with sum ``max(zeros, fixed.sum())``.
    """
    rows, steps = losses.shape
    keys = losses.double()
    if fixed is not None:
        position = torch.arange(steps, device=losses.device)
        keys = torch.where(position < fixed[:, None], -torch.inf, keys)
        zeros = max(zeros, int(fixed.sum()))
    if selection == "heap":
        # Taking the smallest next loss consumes everything behind a row's highest loss so far as soon as that one is
        # taken; so the order of taking is the order of running maxima.
        keys = torch.cummax(keys, dim=1).values
    elif selection == "hull":
        keys = _pool_adjacent_violators(keys)
    elif selection != "sorted":
        raise SpecError("Unknown selection", got=repr(selection), expected='"heap", "sorted" or "hull"')
    if zeros > int(torch.isfinite(keys).sum() + torch.isneginf(keys).sum()):
        raise SpecError("More zeros are asked for than weights can go", got=zeros, expected=f"at most {keys.numel()}")
    taken = torch.sort(keys.flatten(), stable=True).indices[:zeros]
    return torch.bincount(taken // steps, minlength=rows)


def _pool_adjacent_violators(losses: Tensor) -> Tensor:
    """Replace every row by its closest non-decreasing sequence (slopes of the convex hull of its cumulative sum)."""
    pooled = losses.cpu().clone()
    for row in pooled:
        finite = torch.isfinite(row)
        row[finite] = _isotonic(row[finite])
    return pooled.to(losses.device)


def _isotonic(values: Tensor) -> Tensor:
    means: list[float] = []
    sizes: list[int] = []
    for value in values.tolist():
        mean, size = value, 1
        while means and means[-1] > mean:
            previous, count = means.pop(), sizes.pop()
            mean = (mean * size + previous * count) / (size + count)
            size += count
        means.append(mean)
        sizes.append(size)
    return torch.repeat_interleave(
        values.new_tensor(means), torch.tensor(sizes, dtype=torch.int64, device=values.device)
    )


def masks_from_order(order: Tensor, counts: Tensor) -> Tensor:
    """Keep-mask ``[rows, d]`` after ``counts[r]`` steps of ``order[r]`` (``[rows, d]``, column indices)."""
    rows, steps = order.shape
    gone = torch.arange(steps, device=order.device) < counts[:, None]
    keep = torch.ones(rows, steps, dtype=torch.bool, device=order.device)
    return keep.scatter_(1, order.long(), ~gone)
