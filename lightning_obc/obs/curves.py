"""Loss curves of sweeps, for reports: what the elimination has cost by the time so many weights are gone or rounded.

Curves are pairs of a share in (0, 1] and a cumulative damped loss, before any refit; a few dozen points of a layer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_obc.obs.problem import Problem
from lightning_obc.obs.solution import LayerSolution

Curve = tuple[tuple[float, float], ...]
POINTS = 33


def heap_curve(losses: Tensor, fixed: int = 0, points: int = POINTS) -> Curve:
    """The layer's loss in the order of ``selection="heap"``: the row whose next step is cheapest goes on.

    Args:
        losses: ``[rows, steps]`` of a full elimination, each row in its own order.
        fixed: Steps of all rows together that were free: what they remove was zero already.
        points: At most so many, evenly spaced over the other steps.
    """
    losses = losses.double()
    taken = torch.sort(torch.cummax(losses, dim=1).values.flatten(), stable=True).indices
    return line(losses.flatten()[taken], fixed, points=points)


def line(losses: Tensor, fixed: int = 0, whole: int | None = None, points: int = POINTS) -> Curve:
    """The loss over steps in one order for all rows.

    Args:
        losses: ``[steps]``, in the order in which they are made.
        fixed: Steps at the beginning that were free.
        whole: Steps that a full elimination would make; default as many as there are.
        points: At most so many.
    """
    total, last = losses.double().cumsum(0), len(losses)
    steps = _spaced(fixed, last, points)
    at = torch.tensor(steps, dtype=torch.long, device=total.device)
    values = total[at].tolist()
    return _finite([((step + 1) / (whole or last), value) for step, value in zip(steps, values, strict=True)])


def step_curve(losses: Tensor, count: Tensor, fixed: Tensor, whole: int, points: int = POINTS) -> Curve:
    """The loss when all rows make their steps side by side.

    Args:
        losses: ``[rows, steps]``, 0 after a row has ended.
        count: ``[rows]`` steps that each row makes.
        fixed: ``[rows]`` steps of each row at its beginning that were free; the share counts the others alone.
        whole: What the share is of: so many steps over all rows.
        points: At most so many, evenly spaced over the steps of a row.
    """
    free = int(fixed.min())
    steps = _spaced(free, int(count.max()), points)
    at = torch.tensor(steps, dtype=torch.long, device=losses.device)
    values = losses.double().sum(0).cumsum(0)[at].tolist()
    made = torch.minimum(at[:, None] + 1, count[None].long()) - fixed[None]
    shares = (made.clamp(min=0).sum(1) / max(1, whole)).tolist()
    return _finite(list(zip(shares, values, strict=True)))


def column_curve(losses: Tensor, made: Tensor, whole: int, points: int = POINTS) -> Curve:
    """The loss when all rows fix one column after the other, in an order that they share.

    Args:
        losses: ``[d]``, what each step added over all rows.
        made: ``[d]``, how many weights of its column each step rounds, or sets to zero.
        whole: What the share is of: so many weights.
        points: At most so many, evenly spaced over the columns. Columns that make none add to the point before them.
    """
    at = torch.tensor(_spaced(0, len(losses), points), dtype=torch.long, device=losses.device)
    shares, values = (made.long().cumsum(0)[at] / max(1, whole)).tolist(), losses.cumsum(0)[at].tolist()
    return _finite(list(dict(zip(shares, values, strict=True)).items()))


def relative(curve: Curve, problem: Problem, reference: float) -> Curve:
    """The curve with losses as a share of that of a layer without weights: ``½ w (H + λ̄I) wᵀ``.

    Args:
        curve: With losses as they are.
        problem: The problem.
        reference: ``½ Σ w H wᵀ`` of its weight.
    """
    norms = problem.original_batched().double().square().sum((1, 2))
    whole = reference + float((problem.lam_bar * norms).sum() / 2)
    return _finite([(share, loss / whole) for share, loss in curve]) if whole > 0 else ()


def with_curve(solution: LayerSolution, problem: Problem, curve: Curve) -> LayerSolution:
    """The solution of a problem with a curve of losses as they are."""
    return replace(solution, curve=relative(curve, problem, solution.reference))


def _spaced(first: int, last: int, points: int) -> list[int]:
    """Steps between ``first`` and ``last``, evenly spaced, the last one among them."""
    if first >= last:
        return []
    # Not the single step that goes first: it costs so little that it would set the scale of every plot.
    start = min(last - 1, first + (last - first) // points)
    return sorted({round(start + (last - 1 - start) * k / max(1, points - 1)) for k in range(points)})


def _finite(curve: list[tuple[float, float]]) -> Curve:
    good = all(math.isfinite(loss) for _, loss in curve) and any(loss > 0 for _, loss in curve)
    return tuple((share, loss) for share, loss in curve if share > 0) if good else ()
