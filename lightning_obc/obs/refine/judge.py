"""How deep to refine each row: fitted on one half of the calibration samples, judged on the other.

A refinement is a path: the greedy result at depth 0, then states of ever lower damped loss on the samples it is fitted
to. On other samples the loss falls at first and may rise later, sooner for some rows than for others. So the whole
procedure, greedy solver included, is run on each half alone, and every state of the path is scored with the other half.
Neither the start nor the refinement has seen the samples that judge it; judging refinements of the final (all-sample)
greedy result instead would favour the greedy one, which has seen both halves. The final path then starts from the
greedy result on all samples and takes each row to its own depth, 0 included.

The depth of a row is the one of least expected change of its held-out loss. A row's own change is noisy: it is one
draw for each half, of another greedy start. It counts in proportion to its reliability, which the two directions tell:
where the rows that gain in one direction are those that gain in the other, a row's own figure decides; where they
agree about nothing but the average, the layer's figure decides for all rows (the empirical Bayes estimate
``μ + B (x_r - μ)``, with ``B = cov(x¹, x²) / var((x¹ + x²)/2)`` over the rows, kept in [0, 1]).

With half the samples a path overfits sooner than with all, so the judgement errs on the side of the greedy result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.hessian import Hessian
from lightning_obc.obs.problem import row_losses

Path = Iterable[tuple[int, Tensor]]


class Deadline:
    """A moment after which a path takes no further step.

    Args:
        seconds: From now; None never ends.
        whole: The deadline that this one is a share of.

    Attributes:
        hit: True once a path was cut short by it, or by a share of it.
    """

    def __init__(self, seconds: float | None, whole: Deadline | None = None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds
        self.whole, self.hit = whole, False

    def passed(self) -> bool:
        """True from the deadline on; remembers that a path was cut short."""
        over = self.end is not None and time.monotonic() >= self.end
        if over:
            self._note()
        return over

    def _note(self) -> None:
        self.hit = True
        if self.whole is not None:
            self.whole._note()

    def share(self, parts: int) -> Deadline:
        """A deadline after ``1/parts`` of the time that is left."""
        return Deadline(None if self.end is None else max(0.0, self.end - time.monotonic()) / parts, self)


@dataclass(frozen=True)
class Judgement:
    """What the two halves say.

    Attributes:
        depth: ``[g, R]`` int64, how far to refine each row.
        held_out: Relative held-out error at these depths, both directions together.
        greedy: The same at depth 0.
    """

    depth: Tensor
    held_out: float
    greedy: float

    @property
    def gain(self) -> float:
        """Share of the greedy held-out error that refinement saves. The depths were chosen on the same figures, which
        flatters it a little."""
        # Cancellation can leave a tiny negative sum of squares, where inputs hardly vary: none, not a gain above 100 %.
        return 1 - max(self.held_out, 0.0) / self.greedy if self.greedy > 0 else 0.0


def judge(
    weight: Tensor,
    hessian: Hessian,
    path: Callable[[Tensor, Deadline], Path],
    deadline: Deadline,
    coupled: bool = False,
) -> Judgement:
    """Run a path on each half and choose depths on the other.

    Args:
        weight: ``[g, R, d]`` dense weights.
        hessian: Statistic with samples in both halves.
        path: ``path(half_hessian, deadline)`` yields ``(depth, weights [g, R, d])``, ascending, from depth 0 on.
        deadline: Shared by the two paths and what follows.
        coupled: One depth for all rows (they share a scale).

    Returns:
        The depths. A path that ends early has its last state at all greater depths.
    """
    halves = [hessian.half(index).to(weight.device) for index in (0, 1)]
    dense = weight.double()
    scores: list[dict[int, Tensor]] = []
    for index, (fitted, judging) in enumerate((halves, halves[::-1])):
        limit = deadline.share(3 - index)
        scores.append({depth: row_losses(state.double() - dense, judging) for depth, state in path(fitted, limit)})
    depths = sorted({0}.union(*scores))
    one, two = (torch.stack([_at(score, depth) for depth in depths]) for score in scores)
    # A sort, because argmin does not say which of equal values it returns; ties go to the shallowest.
    best = torch.sort(expected_change(one, two, coupled), dim=0, stable=True).indices[:1]
    table = one + two
    reference = max(float(sum(row_losses(dense, half).sum() for half in halves)), 1e-300)
    held_out, greedy = float(table.gather(0, best).sum()) / reference, float(table[0].sum()) / reference
    return Judgement(torch.tensor(depths, device=weight.device)[best[0]], held_out, greedy)


def expected_change(one: Tensor, two: Tensor, coupled: bool = False) -> Tensor:
    """Expected relative change of every row's held-out loss at every depth, from both directions.

    Args:
        one: ``[depths, g, R]`` held-out losses, fitted on the first half and judged on the second.
        two: The same the other way round.
        coupled: All rows share the layer's figure.

    Returns:
        ``[depths, g, R]`` float64; 0 at depth 0.
    """
    flat = [part.flatten(1) for part in (one, two, one + two)]
    first, second, own = map(_relative, flat)
    layer = _relative(flat[2].sum(1, keepdim=True))
    if coupled or own.shape[1] == 1:
        return layer.expand_as(own).reshape(one.shape)
    centred = [part - part.mean(1, keepdim=True) for part in (first, second)]
    shared = (centred[0] * centred[1]).mean(1, keepdim=True)
    spread = ((centred[0] + centred[1]) / 2).square().mean(1, keepdim=True)
    reliability = (shared / spread.clamp(min=1e-300)).clamp(0, 1)
    return (layer + reliability * (own - layer)).reshape(one.shape)


def _relative(losses: Tensor) -> Tensor:
    """Change relative to depth 0; 0 for rows that are exact there."""
    before = losses[:1]
    return torch.where(before > 0, losses / torch.where(before > 0, before, 1.0) - 1, 0.0)


def _at(score: dict[int, Tensor], depth: int) -> Tensor:
    """The score at a depth, or at the deepest state before it."""
    return score[max(known for known in score if known <= depth)]
