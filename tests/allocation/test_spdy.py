"""SPDY's coefficient search: what it finds, what it spends, what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_obc.allocation.search import Profile, Programme
from lightning_obc.allocation.spdy import SPDY, spdy_scores, spdy_search
from lightning_obc.errors import NonFiniteError, SpecError

LAYERS, LEVELS = 8, 10
COSTS = {f"l{i}": {f"{k}": (i + 1) * 0.8**k for k in range(LEVELS)} for i in range(LAYERS)}
BUDGET = 0.4 * sum(row["0"] for row in COSTS.values())
# Sensitivities that the prior knows nothing about.
TRUE = np.exp(2 * np.random.default_rng(3).normal(size=LAYERS))


def loss(profile: Profile) -> float:
    return float(sum(TRUE[int(name[1:])] * (int(level) / (LEVELS - 1)) ** 2 for name, level in profile.items()))


def test_prior_is_quadratic_in_the_rank_of_the_cost() -> None:
    scores = spdy_scores({"a": {"dense": 9.0, "half": 3.0, "low": 1.0, "same": 3.0}, "b": {"only": 1.0}})
    assert scores == {"a": {"dense": 0.0, "half": 0.25, "same": 0.25, "low": 1.0}, "b": {"only": 0.0}}


@pytest.mark.parametrize("seed", range(3))
def test_search_closes_most_of_the_gap_between_the_prior_and_the_optimum(seed: int) -> None:
    programme = Programme(COSTS, [BUDGET])
    prior = spdy_scores(COSTS)
    plain = loss(programme.solve(prior)[0].profile)
    truth = {name: {level: loss({name: level}) for level in row} for name, row in COSTS.items()}
    optimum = programme.solve(truth)[0].score
    found = spdy_search(programme, prior, loss, SPDY(starts=60, tries=100, share=0.3, seed=seed))
    assert found.choice.cost <= BUDGET
    assert found.value == loss(found.choice.profile)
    assert optimum - 1e-9 <= found.value
    assert found.value - optimum < 0.5 * (plain - optimum)
    assert found.stopped == "done"
    values = [value for _, value in found.history]
    assert values == sorted(values, reverse=True)


def test_seed_decides_everything() -> None:
    programme, prior = Programme(COSTS, [BUDGET]), spdy_scores(COSTS)
    runs = [spdy_search(programme, prior, loss, SPDY(starts=5, tries=5, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0].choice == runs[1].choice
    assert runs[0].history == runs[1].history
    assert runs[0].history != runs[2].history


def test_limits_hold_and_known_profiles_cost_nothing() -> None:
    seen: list[tuple[str, ...]] = []

    def counted(profile: Profile) -> float:
        seen.append(tuple(profile.values()))
        return loss(profile)

    programme, prior = Programme(COSTS, [BUDGET]), spdy_scores(COSTS)
    limited = spdy_search(programme, prior, counted, SPDY(evaluations=7))
    assert (limited.evaluations, limited.stopped) == (7, "evaluations")
    assert len(seen) == 7 == len(set(seen))
    late = spdy_search(programme, prior, loss, SPDY(seconds=1e-9), initial=[programme.solve(prior)[0].profile])
    assert (late.evaluations, late.stopped) == (1, "seconds")


def test_result_is_never_worse_than_the_initial_profiles() -> None:
    programme, prior = Programme(COSTS, [BUDGET]), spdy_scores(COSTS)
    truth = {name: {level: loss({name: level}) for level in row} for name, row in COSTS.items()}
    best = programme.solve(truth)[0].profile
    found = spdy_search(programme, prior, loss, SPDY(starts=3, tries=3), initial=[best])
    assert found.value <= loss(best)
    with pytest.raises(SpecError, match="exceeds the budget"):
        spdy_search(programme, prior, loss, initial=[dict.fromkeys(COSTS, "0")])


def test_nan_losses_lose_and_only_nan_is_an_error() -> None:
    programme, prior = Programme(COSTS, [BUDGET]), spdy_scores(COSTS)
    plain = programme.solve(prior)[0].profile
    found = spdy_search(programme, prior, lambda p: math.nan if p == plain else loss(p), SPDY(starts=20, tries=5))
    assert found.choice.profile != plain
    with pytest.raises(NonFiniteError, match="finite loss"):
        spdy_search(programme, prior, lambda p: math.nan, SPDY(starts=2, tries=1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"starts": 0, "tries": 0},
        {"starts": -1},
        {"share": 0.0},
        {"share": 1.5},
        {"evaluations": 0},
        {"evaluations": 1},
        {"evaluations": 2.5},
        {"evaluations": True},
        {"seconds": -1.0},
        {"prior": "?"},
    ],
)
def test_impossible_extents_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        SPDY(**arguments)  # type: ignore[arg-type]


def test_several_budgets_are_refused() -> None:
    with pytest.raises(SpecError, match="one budget"):
        spdy_search(Programme(COSTS, [BUDGET, BUDGET]), spdy_scores(COSTS), loss)


def test_a_limit_that_leaves_nothing_to_search_is_refused_before_anything_is_evaluated() -> None:
    programme, prior = Programme(COSTS, [BUDGET]), spdy_scores(COSTS)
    first = programme.solve(prior)[0].profile
    truth = {name: {level: loss({name: level}) for level in row} for name, row in COSTS.items()}
    second = programme.solve(truth)[0].profile
    assert first != second
    seen: list[Profile] = []
    with pytest.raises(SpecError, match=r"2 profiles .* Expected: an integer of at least 3"):
        spdy_search(programme, prior, lambda p: float(len(seen)), SPDY(evaluations=2), initial=[first, second, first])
    assert not seen
    found = spdy_search(programme, prior, loss, SPDY(evaluations=3), initial=[first, second])
    assert found.evaluations == 3
