"""The best level for every layer under a budget: an exact dynamic programme over cost buckets (paper, section 6).

Every layer takes one level; the sum of the scores is minimised, the sum of the costs is bounded. Each layer's cheapest
level costs nothing here and only what others cost *more* is put into buckets, rounded up. So the cheapest profile is
always within reach, levels of zero cost are like any other, and a profile never costs more than its budget.

Rounding up wastes up to a bucket per layer, so the table goes on that far past the budget. The end of the table that is
furthest out and whose profile keeps the budget in real cost wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_obc.allocation.reach import out_of_reach
from lightning_obc.errors import BudgetError, SpecError

Table = Mapping[str, Mapping[str, float]]
Profile = dict[str, str]

MAX_REFINEMENT = 10
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Choice:
    """One level for every layer.

    Attributes:
        profile: Level name by layer name.
        cost: Real cost of the profile, what is fixed included.
        score: Sum of the levels' scores.
        budget: The bound that ``cost`` keeps.
    """

    profile: Profile
    cost: float
    score: float
    budget: float


@dataclass(frozen=True)
class _Layer:
    name: str
    levels: tuple[str, ...]
    costs: NDArray[np.float64]
    extra: NDArray[np.int64]


class Programme:
    """Costs and budgets, prepared once; :meth:`solve` runs the dynamic programme for given scores.

    One table serves all budgets: its buckets are as fine as the smallest budget wants, within ten times ``buckets``.

    Args:
        costs: ``{layer: {level: cost}}``, finite and not negative. A level that a layer lacks is left out.
        budgets: Bounds on the total cost, in the unit of ``costs``.
        buckets: Resolution: every cost is rounded up to ``budget above the minimum / buckets``.
        fixed: Cost of everything that has no choice, in all or by name; part of the budget.
        notes: What restricts a layer, or why something has no choice, by name: errors of budgets say it.

    Raises:
        SpecError: A layer without levels; a cost that is negative, infinite or NaN.
        BudgetError: A budget that no profile meets; the message names the least that can be reached, and the layers
            and parts that cost most in it.
    """

    def __init__(
        self,
        costs: Table,
        budgets: Sequence[float],
        *,
        buckets: int = 10_000,
        fixed: float | Mapping[str, float] = 0.0,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        if buckets < 1:
            raise SpecError("Too few buckets", got=buckets, expected="at least 1")
        _check_costs(costs)
        self.budgets = [float(budget) for budget in budgets]
        self._parts = dict(fixed) if isinstance(fixed, Mapping) else {"what has no choice": float(fixed)}
        self._notes = dict(notes or {})
        self.fixed, self.buckets = math.fsum(self._parts.values()), buckets
        self._costs = {name: dict(levels) for name, levels in costs.items()}
        self.minimum = self.fixed + math.fsum(min(levels.values()) for levels in costs.values())
        self.maximum = self.fixed + math.fsum(max(levels.values()) for levels in costs.values())
        check_budgets(self.budgets, self.minimum)
        if small := [budget for budget in self.budgets if budget < self.minimum * (1 - _ROUNDING)]:
            raise out_of_reach(small, self._costs, self._parts, self._notes)
        spare = [max(0.0, budget - self.minimum) for budget in self.budgets]
        self._bucket = _bucket_size(spare, self.maximum - self.minimum, buckets)
        self._layers = [_prepare(name, levels, self._bucket) for name, levels in self._costs.items()]
        most = sum(int(layer.extra.max()) for layer in self._layers)
        self._ends = [min(_whole_buckets(one, self._bucket), most) for one in spare]

    @property
    def layers(self) -> list[str]:
        return [layer.name for layer in self._layers]

    def cost(self, profile: Mapping[str, str]) -> float:
        """Real cost of a profile.

        Raises:
            SpecError: A layer or level that is unknown.
        """
        return self.fixed + math.fsum(_look_up(self._costs, name, profile, "cost") for name in self._costs)

    def solve(self, scores: Table) -> list[Choice]:
        """The profile of least total score for every budget, in their order.

        Args:
            scores: ``{layer: {level: score}}``, one for every level that has a cost; ``inf`` bars a level.

        Raises:
            SpecError: A score that is missing or NaN.
            BudgetError: The levels that are not barred cannot meet a budget.
        """
        value = np.zeros(max(self._ends) + len(self._layers) + 1)
        picks = []
        for layer in self._layers:
            value, pick = _add_layer(value, layer, _scores_of(scores, layer))
            picks.append(pick)
        return [
            self._choice(end, budget, value, picks, scores)
            for end, budget in zip(self._ends, self.budgets, strict=True)
        ]

    def _choice(
        self, end: int, budget: float, value: NDArray[np.float64], picks: list[NDArray[np.int32]], scores: Table
    ) -> Choice:
        if not np.isfinite(value[end]):
            raise self._barred(budget, scores)
        bound = budget * (1 + _ROUNDING)
        profiles = (self._profile(picks, last) for last in range(end + len(self._layers), end - 1, -1))
        profile = next(profile for profile in profiles if self.cost(profile) <= bound)
        score = math.fsum(scores[name][level] for name, level in profile.items())
        return Choice(profile, self.cost(profile), score, budget)

    def _profile(self, picks: list[NDArray[np.int32]], end: int) -> Profile:
        chosen: list[str] = []
        for layer, pick in zip(reversed(self._layers), reversed(picks), strict=True):
            index = int(pick[end])
            chosen.append(layer.levels[index])
            end -= int(layer.extra[index])
        return dict(zip(self.layers, reversed(chosen), strict=True))

    def _barred(self, budget: float, scores: Table) -> BudgetError:
        usable = {
            name: {level: cost for level, cost in row.items() if scores[name][level] < math.inf}
            for name, row in self._costs.items()
        }
        return out_of_reach([budget], usable, self._parts, self._notes)


def check_budgets(budgets: Sequence[float], minimum: float, dense: float | None = None) -> None:
    """Refuse budgets that are none, or that the dense model meets already.

    Args:
        budgets: Bounds on the total cost.
        minimum: The least total cost of any profile, for the message.
        dense: Cost of the dense model, if larger budgets are to be refused.

    Raises:
        BudgetError: No budgets; one that is not a positive number, or above ``dense``.
    """
    if not budgets:
        raise BudgetError("No budget is given", got="[]", expected="at least one budget")
    wrong = [budget for budget in budgets if not (math.isfinite(budget) and budget > 0)]
    if wrong:
        raise BudgetError(
            "A budget is not a positive number",
            got=wrong,
            expected=f"at least {minimum:.6g}, the best reachable budget" if minimum > 0 else "a number above 0",
        )
    large = [budget for budget in budgets if dense is not None and budget > dense * (1 + _ROUNDING)]
    if large:
        raise BudgetError(
            "A budget is larger than the cost of the dense model, so that nothing is to be compressed",
            got=large,
            expected=f"at most {dense:.6g}",
            remedy="budgets below the dense cost",
        )


def _check_costs(costs: Table) -> None:
    if not costs:
        raise SpecError("There are no layers to choose levels for", got="{}", expected="{layer: {level: cost}}")
    empty = [name for name, levels in costs.items() if not levels]
    if empty:
        raise SpecError(
            "Some layers have no level",
            got=", ".join(empty),
            expected="at least one level with a cost, such as the dense one",
        )
    wrong = [
        f"{name} at {level}: {cost}"
        for name, levels in costs.items()
        for level, cost in levels.items()
        if not (math.isfinite(cost) and cost >= 0)
    ]
    if wrong:
        raise SpecError("Some costs are not possible", got="; ".join(wrong[:8]), expected="finite numbers >= 0")


def _bucket_size(spare: Sequence[float], useful: float, buckets: int) -> float:
    """Width of a bucket. Above ``useful`` every level is affordable, so that nothing has to be resolved there."""
    relevant = [min(one, useful) for one in spare if one > 0]
    if not relevant or useful == 0:
        return 0.0
    return max(min(relevant) / buckets, max(relevant) / (MAX_REFINEMENT * buckets))


def _whole_buckets(spare: float, bucket: float) -> int:
    if bucket == 0:
        return 0
    count = spare / bucket
    nearest = round(count)
    # Only the division's last bit may be forgiven; the profile's real cost is verified in the end.
    return nearest if abs(count - nearest) <= _ROUNDING * max(1, nearest) else math.floor(count)


def _prepare(name: str, levels: Mapping[str, float], bucket: float) -> _Layer:
    """A layer's levels by ascending cost, with what each costs above the cheapest in buckets."""
    ordered = sorted(levels, key=lambda level: levels[level])
    costs = np.array([levels[level] for level in ordered], dtype=np.float64)
    above = costs - costs[0]
    if bucket > 0:
        extra = np.ceil(above / bucket)
    else:
        extra = np.where(above > 0, 1.0, 0.0)
    return _Layer(name, tuple(ordered), costs, np.minimum(extra, 2**62).astype(np.int64))


def _scores_of(scores: Table, layer: _Layer) -> NDArray[np.float64]:
    missing = [level for level in layer.levels if level not in scores.get(layer.name, {})]
    if missing:
        raise SpecError(
            f"Layer {layer.name!r} has levels without a score", got=missing[:8], expected="a score for every level"
        )
    values = np.array([scores[layer.name][level] for level in layer.levels], dtype=np.float64)
    if np.isnan(values).any() or np.isneginf(values).any():
        bad = [level for level, value in zip(layer.levels, values, strict=True) if not value > -math.inf]
        raise SpecError(f"Layer {layer.name!r} has scores that are not numbers", got=bad[:8], expected="numbers or inf")
    return values


def _add_layer(
    value: NDArray[np.float64], layer: _Layer, scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """``new[b] = min_k value[b - extra_k] + score_k`` and the ``k`` that attains it; ties go to the cheaper level."""
    size = len(value)
    best = np.full(size, np.inf)
    pick = np.zeros(size, dtype=np.int32)
    least = math.inf
    for index, (extra, score) in enumerate(zip(layer.extra.tolist(), scores.tolist(), strict=True)):
        # Levels come by ascending cost: one that does not lower the score is never taken.
        if extra >= size or not score < least:
            continue
        least = score
        candidate = value[: size - extra] + score
        better = candidate < best[extra:]
        np.copyto(best[extra:], candidate, where=better)
        np.copyto(pick[extra:], index, where=better)
    return best, pick


def _look_up(table: Table, name: str, profile: Mapping[str, str], what: str) -> float:
    if name not in profile:
        raise SpecError(f"A profile lacks layer {name!r}", got=sorted(profile)[:8], expected="a level for every layer")
    if profile[name] not in table[name]:
        raise SpecError(
            f"Layer {name!r} has no {what} at this level",
            got=repr(profile[name]),
            expected=f"one of {sorted(table[name])[:12]}",
        )
    return table[name][profile[name]]
