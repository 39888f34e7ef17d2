"""SPDY: search for the layers' weights in the dynamic programme by what a profile really does to the loss.

Frantar and Alistarh, "SPDY" (arXiv 2201.13096), section 3: every layer's scores are multiplied by a coefficient, the
programme turns coefficients into a profile that keeps the budget, and a random search finds the coefficients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_obc.allocation.search import Choice, Profile, Programme, Table
from lightning_obc.errors import NonFiniteError, SpecError

Evaluate = Callable[[Profile], float]


@dataclass(frozen=True)
class SPDY:
    """Extent of the search.

    Args:
        starts: Random coefficient vectors to begin with (SPDY: 100).
        tries: Attempts at each size of the neighbourhood (SPDY: 100).
        share: Largest neighbourhood, as a share of the layers (SPDY: 0.1): ``max(1, ⌊share · layers⌋)`` coefficients
            are resampled at first, in the end one.
        evaluations: Most profiles that are evaluated, those that the search sets out from included; None sets no
            limit. A profile met again costs nothing.
        seconds: Wall time after which no new profile is evaluated; None sets no limit.
        seed: Seed of the coefficients.
        prior: What the coefficients multiply: SPDY's ``"quadratic"`` scores in the rank of the cost, or the
            ``"scores"`` of the dynamic programme, so that the search sets out from that programme's profile.

    Raises:
        SpecError: A value that is unknown or out of range.
    """

    starts: int = 100
    tries: int = 100
    share: float = 0.1
    evaluations: int | None = None
    seconds: float | None = None
    seed: int = 0
    prior: Literal["quadratic", "scores"] = "scores"

    def __post_init__(self) -> None:
        if self.starts < 0 or self.tries < 0 or self.starts + self.tries == 0:
            raise SpecError(
                "SPDY has nothing to try", got=(self.starts, self.tries), expected="starts or tries above 0"
            )
        if not 0 < self.share <= 1:
            raise SpecError("SPDY.share is not possible", got=self.share, expected="a share of the layers in (0, 1]")
        if self.prior not in ("quadratic", "scores"):
            raise SpecError("SPDY.prior is unknown", got=repr(self.prior), expected='"quadratic" or "scores"')
        for name in ("evaluations", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SpecError(f"SPDY.{name} is not possible", got=value, expected="a number above 0, or None")
        self.check_searches(1)

    def check_searches(self, known: int) -> None:
        """Refuse a limit at which nothing is tried besides the profiles that are known before.

        Args:
            known: Distinct profiles that the search sets out from; 1 without any, the programme's own.

        Raises:
            SpecError: ``evaluations`` is no integer above ``known``.
        """
        limit = self.evaluations
        if limit is None or (isinstance(limit, int) and limit > known):
            return
        start = "profile" if known == 1 else f"{known} profiles"
        raise SpecError(
            f"SPDY.evaluations leaves nothing to search: the {start} it sets out from count too",
            got=limit,
            expected=f"an integer of at least {known + 1}; SPDY evaluates hundreds",
            remedy="a larger number, None, or a method that needs no evaluations: the dynamic programme",
        )


@dataclass(frozen=True)
class SPDYResult:
    """What the search found.

    Attributes:
        choice: The best profile; its score is the sum of the scores *before* coefficients.
        value: ``evaluate`` of it.
        evaluations: Profiles evaluated.
        history: ``(evaluations so far, best value so far)`` at each improvement.
        stopped: ``"done"``, ``"evaluations"`` or ``"seconds"``.
    """

    choice: Choice
    value: float
    evaluations: int
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = "done"


def spdy_scores(costs: Table) -> dict[str, dict[str, float]]:
    """SPDY's prior: the level that is i-th in descending cost scores ``(i / (n - 1))²``, equal costs alike."""
    scores: dict[str, dict[str, float]] = {}
    for name, levels in costs.items():
        ranks = {cost: rank for rank, cost in enumerate(sorted(set(levels.values()), reverse=True))}
        last = max(1, len(ranks) - 1)
        scores[name] = {level: (ranks[cost] / last) ** 2 for level, cost in levels.items()}
    return scores


def spdy_search(
    programme: Programme,
    scores: Table,
    evaluate: Evaluate,
    spec: SPDY | None = None,
    *,
    initial: Sequence[Mapping[str, str]] = (),
) -> SPDYResult:
    """Search coefficients for one budget.

    Args:
        programme: With one budget.
        scores: The prior, ``{layer: {level: score}}``; see :func:`spdy_scores`.
        evaluate: ``evaluate(profile)``, smaller is better; called once per distinct profile. NaN counts as infinite.
        spec: Extent of the search.
        initial: Profiles to evaluate first, so that the result is never worse than they are.

    Raises:
        SpecError: The programme has several budgets, an initial profile exceeds the budget, or there are as many
            initial profiles as evaluations.
        NonFiniteError: No profile has a finite value.
    """
    if len(programme.budgets) != 1:
        raise SpecError("SPDY searches one budget at a time", got=programme.budgets, expected="one budget")
    spec = spec or SPDY()
    spec.check_searches(max(1, len({tuple(profile[name] for name in programme.layers) for profile in initial})))
    run = _Run(programme, scores, evaluate, spec)
    try:
        for profile in initial:
            run.consider(dict(profile), None)
        run.random_starts()
        run.local_search()
        stopped = "done"
    except _OutOfTime as limit:
        stopped = str(limit)
    if run.best is None or not math.isfinite(run.value):
        raise NonFiniteError(
            "No profile that SPDY tried has a finite value",
            got=f"{run.evaluations} profiles",
            expected="a finite loss",
            remedy="check the loss function on the dense model",
        )
    cost = programme.cost(run.best)
    score = math.fsum(scores[name][level] for name, level in run.best.items())
    choice = Choice(run.best, cost, score, programme.budgets[0])
    return SPDYResult(choice, run.value, run.evaluations, run.history, stopped)


class _OutOfTime(Exception):
    """A limit is reached; its text is the limit's name."""


class _Run:
    def __init__(self, programme: Programme, scores: Table, evaluate: Evaluate, spec: SPDY) -> None:
        self._programme, self._scores, self._evaluate, self._spec = programme, scores, evaluate, spec
        self._random = np.random.default_rng(spec.seed)
        self._deadline = math.inf if spec.seconds is None else time.monotonic() + spec.seconds
        self._known: dict[tuple[str, ...], float] = {}
        self.best: Profile | None = None
        self.coefficients: NDArray[np.float64] = np.ones(len(programme.layers))
        self.value = math.inf
        self.evaluations = 0
        self.history: list[tuple[int, float]] = []

    def random_starts(self) -> None:
        self._try(self.coefficients)
        for _ in range(self._spec.starts):
            self._try(1 - self._random.random(len(self.coefficients)))

    def local_search(self) -> None:
        count = len(self.coefficients)
        for size in range(max(1, int(self._spec.share * count)), 0, -1):
            for _ in range(self._spec.tries):
                trial = self.coefficients.copy()
                chosen = self._random.choice(count, size, replace=False)
                trial[chosen] = 1 - self._random.random(size)
                self._try(trial)

    def _try(self, coefficients: NDArray[np.float64]) -> None:
        if time.monotonic() > self._deadline:
            raise _OutOfTime("seconds")
        weighted = {
            name: {level: float(factor) * score for level, score in self._scores[name].items()}
            for name, factor in zip(self._programme.layers, coefficients, strict=True)
        }
        self.consider(self._programme.solve(weighted)[0].profile, coefficients)

    def consider(self, profile: Profile, coefficients: NDArray[np.float64] | None) -> None:
        """Evaluate a profile unless it is known; keep it if it is the best so far."""
        if coefficients is None and self._programme.cost(profile) > self._programme.budgets[0] * (1 + 1e-9):
            raise SpecError(
                "An initial profile exceeds the budget",
                got=self._programme.cost(profile),
                expected=f"at most {self._programme.budgets[0]:.6g}",
            )
        key = tuple(profile[name] for name in self._programme.layers)
        if key not in self._known:
            if self._spec.evaluations is not None and self.evaluations >= self._spec.evaluations:
                raise _OutOfTime("evaluations")
            value = float(self._evaluate(profile))
            self._known[key] = math.inf if math.isnan(value) else value
            self.evaluations += 1
        value = self._known[key]
        if value < self.value:
            self.best, self.value = profile, value
            self.history.append((self.evaluations, value))
            if coefficients is not None:
                self.coefficients = coefficients
        elif value == self.value and coefficients is not None:
            # Moving along a plateau is free, and lets the neighbourhood drift.
            self.coefficients = coefficients
