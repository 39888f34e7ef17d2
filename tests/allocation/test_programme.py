"""The dynamic programme against enumeration, a linear-programme bound, and everything it must refuse."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_obc.allocation.search import Programme, check_budgets
from lightning_obc.errors import BudgetError, SpecError


def table(values: list[list[float]]) -> dict[str, dict[str, float]]:
    return {f"layer{i}": {f"level{k}": float(v) for k, v in enumerate(row)} for i, row in enumerate(values)}


def enumerate_best(costs: list[list[float]], scores: list[list[float]], budget: float) -> float:
    best = math.inf
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        if sum(costs[i][k] for i, k in enumerate(choice)) <= budget:
            best = min(best, sum(scores[i][k] for i, k in enumerate(choice)))
    return best


instances = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(instances, st.integers(0, 40))
def test_integer_costs_are_solved_exactly(instance: list[list[tuple[int, int]]], spare: int) -> None:
    """Zero costs, equal costs and single levels included: with a bucket per unit of cost nothing is lost."""
    costs = [[float(cost) for cost, _ in row] for row in instance]
    scores = [[float(score) for _, score in row] for row in instance]
    minimum = sum(min(row) for row in costs)
    budget = minimum + spare
    if budget == 0:
        return
    programme = Programme(table(costs), [budget], buckets=max(spare, 1))
    choice = programme.solve(table(scores))[0]
    assert choice.score == enumerate_best(costs, scores, budget)
    assert choice.cost == sum(costs[i][int(level[5:])] for i, level in enumerate(choice.profile.values())) <= budget


@pytest.mark.parametrize("seed", range(8))
def test_real_costs_lose_no_more_than_the_rounding(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = random.random((5, 4)).tolist()
    scores = random.random((5, 4)).tolist()
    minimum, maximum = sum(map(min, costs)), sum(map(max, costs))
    budget, buckets = minimum + 0.4 * (maximum - minimum), 200
    choice = Programme(table(costs), [budget], buckets=buckets).solve(table(scores))[0]
    bucket = (budget - minimum) / buckets
    assert choice.cost <= budget
    assert enumerate_best(costs, scores, budget) <= choice.score
    assert choice.score <= enumerate_best(costs, scores, budget - len(costs) * bucket)


def large_instance(layers: int = 60, levels: int = 50) -> tuple[dict, dict]:
    random = np.random.default_rng(0)
    density = 0.9 ** np.arange(levels)
    weights = random.integers(1, 100, layers)[:, None]
    sensitivity = np.exp(random.normal(size=layers))[:, None]
    return table((weights * density).tolist()), table((sensitivity * (1 / density - 1)).tolist())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_large_instances_lie_between_the_linear_bound_and_one_level_above(share: float) -> None:
    """The linear relaxation has at most one layer between two levels, so the optimum is that close to it."""
    optimize = pytest.importorskip("scipy.optimize")
    costs, scores = large_instance()
    dense = sum(row["level0"] for row in costs.values())
    budget = share * dense
    choice = Programme(costs, [budget]).solve(scores)[0]
    names = list(costs)
    cost = np.concatenate([list(costs[name].values()) for name in names])
    score = np.concatenate([list(scores[name].values()) for name in names])
    one_each = np.kron(np.eye(len(names)), np.ones(50))
    bound = optimize.linprog(score, A_ub=cost[None], b_ub=[budget], A_eq=one_each, b_eq=np.ones(len(names)))
    gap = max(np.diff(list(row.values())).max() for row in scores.values())
    assert bound.fun <= choice.score * (1 + 1e-9)
    assert choice.score <= bound.fun + gap
    assert choice.score <= 1.002 * bound.fun, "on so smooth an instance rounding must cost next to nothing"


def test_sixty_layers_fifty_levels_ten_thousand_buckets_take_less_than_two_seconds() -> None:
    costs, scores = large_instance()
    budget = 0.3 * sum(row["level0"] for row in costs.values())
    started = time.perf_counter()
    choice = Programme(costs, [budget], buckets=10_000).solve(scores)[0]
    assert time.perf_counter() - started < 2
    assert 0.995 * budget < choice.cost <= budget


def test_one_table_serves_several_budgets() -> None:
    costs, scores = large_instance(12, 20)
    dense = sum(row["level0"] for row in costs.values())
    budgets = [0.9 * dense, 0.2 * dense, 0.5 * dense]
    together = Programme(costs, budgets).solve(scores)
    alone = [Programme(costs, [budget]).solve(scores)[0] for budget in budgets]
    for one, other, budget in zip(together, alone, budgets, strict=True):
        assert one.budget == budget
        assert one.cost <= budget
        assert one.score == pytest.approx(other.score, rel=2e-3)
    assert together[0].score < together[2].score < together[1].score


def test_more_than_everything_needs_takes_the_best_level_everywhere() -> None:
    costs, scores = large_instance(6, 10)
    choice = Programme(costs, [1e12, 50.0 + sum(min(row.values()) for row in costs.values())]).solve(scores)[0]
    assert set(choice.profile.values()) == {"level0"}


def test_a_budget_of_exactly_the_minimum_is_met() -> None:
    costs, scores = table([[0.3, 0.1], [0.7, 0.2]]), table([[0, 1], [0, 1]])
    choice = Programme(costs, [0.1 + 0.2 + 5.0], fixed=5.0).solve(scores)[0]
    assert choice.profile == {"layer0": "level1", "layer1": "level1"}


def test_ties_go_to_the_cheaper_level() -> None:
    choice = Programme(table([[3, 1, 2]]), [3]).solve(table([[1, 1, 1]]))[0]
    assert choice.profile == {"layer0": "level1"}


def test_an_unreachable_budget_names_the_best_reachable_one() -> None:
    with pytest.raises(BudgetError, match=r"Got: 2.5, 1.*at least 3, the best reachable budget"):
        Programme(table([[5, 1], [4, 2]]), [6, 2.5, 1])


def test_an_unreachable_budget_names_what_blocks_it() -> None:
    costs = {"small": {"dense": 9.0, "w4": 1.0}, "large": {"dense": 20.0, "w8": 6.0}}
    costs |= {f"tiny{i}": {"dense": 1.0, "w4": 0.125} for i in range(8)}
    notes = {"large": "levels that do not fit it: 2:4", "stem": "left out", "": "not counted at all: odd (why)"}
    with pytest.raises(BudgetError) as refused:
        Programme(costs, [5.0], fixed={"stem": 2.0}, notes=notes)
    text = str(refused.value)
    assert "Got: 5. Expected: at least 10, the best reachable budget; it is the sum of large 6 (60 %, " in text
    assert (
        "large 6 (60 %, cheapest level 'w8', levels that do not fit it: 2:4), stem 2 (20 %, no choice, left out)"
        in text
    )
    assert "small 1 (10 %, cheapest level 'w4')" in text
    assert "6 more, together 0.75 (7.5 %); not counted at all: odd (why)" in text
    assert text.endswith("Remedy: a larger budget, or stronger levels, above all for large and small.")
    with pytest.raises(
        BudgetError, match=r"levels alone do not help, since what has no choice costs 2: search stem too"
    ):
        Programme(costs, [1.0], fixed={"stem": 2.0}, notes=notes)


def test_barred_levels_raise_the_best_reachable_budget() -> None:
    programme = Programme(table([[5, 1], [4, 2]]), [6])
    with pytest.raises(BudgetError, match="at least 7, the best reachable"):
        programme.solve(table([[0, math.inf], [0, 1]]))


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf])
def test_budgets_that_are_no_positive_numbers(budget: float) -> None:
    with pytest.raises(BudgetError, match="not a positive number"):
        Programme(table([[0, 1]]), [budget])


def test_budgets_above_the_dense_cost() -> None:
    with pytest.raises(BudgetError, match=r"larger than the cost of the dense model.*at most 10"):
        check_budgets([11], 1, dense=10)
    check_budgets([10], 1, dense=10)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_impossible_costs_are_refused_by_name(cost: float) -> None:
    with pytest.raises(SpecError, match="layer1 at level0"):
        Programme(table([[1], [cost]]), [3])


def test_layers_without_levels_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match="empty"):
        Programme({"full": {"dense": 1.0}, "empty": {}}, [3])


def test_scores_that_are_missing_or_nan_are_refused_by_name() -> None:
    programme = Programme(table([[1, 2]]), [3])
    with pytest.raises(SpecError, match=r"layer0.*level1"):
        programme.solve({"layer0": {"level0": 0.0}})
    with pytest.raises(SpecError, match=r"layer0.*level1"):
        programme.solve(table([[0, math.nan]]))


def test_cost_of_a_foreign_profile() -> None:
    programme = Programme(table([[1, 2]]), [3], fixed=1)
    assert programme.cost({"layer0": "level1"}) == 3
    with pytest.raises(SpecError, match="lacks layer 'layer0'"):
        programme.cost({})
    with pytest.raises(SpecError, match="no cost at this level"):
        programme.cost({"layer0": "3:4"})
