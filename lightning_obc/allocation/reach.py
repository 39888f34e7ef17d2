"""Why a budget is out of reach: what costs most at its cheapest level, and what the search has no choice about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_obc.errors import BudgetError

Table = Mapping[str, Mapping[str, float]]
MOST = 5


def out_of_reach(
    budgets: Sequence[float], costs: Table, fixed: Mapping[str, float], notes: Mapping[str, str]
) -> BudgetError:
    """The error of budgets below the least cost, with what that consists of.

    Args:
        budgets: Those that cannot be met.
        costs: ``{layer: {level: cost}}`` of the levels that may be chosen; a layer without any bars every budget.
        fixed: Cost of everything without a choice, by name.
        notes: What restricts a layer, or why something has no choice, by name; under ``""`` what no cost counts.
    """
    cheapest = {name: min(row, key=lambda level: row[level]) for name, row in costs.items() if row}
    layers = {name: costs[name][level] for name, level in cheapest.items()}
    none_left = [name for name, row in costs.items() if not row]
    minimum = math.inf if none_left else math.fsum(layers.values()) + math.fsum(fixed.values())
    entries = [(cost, name, f"cheapest level {cheapest[name]!r}") for name, cost in layers.items()]
    entries += [(cost, name, "no choice") for name, cost in fixed.items()]
    entries = sorted((entry for entry in entries if entry[0] > 0), key=lambda entry: -entry[0])
    shown = [_entry(*entry, minimum, notes) for entry in entries[:MOST]]
    if rest := entries[MOST:]:
        cost = math.fsum(entry[0] for entry in rest)
        shown.append(f"{len(rest)} more, together {cost:.3g}" + "".join(f" ({x})" for x in _share(cost, minimum)))
    expected = f"at least {minimum:.6g}, the best reachable budget"
    expected += f"; it is the sum of {', '.join(shown)}" if shown else ""
    expected += f"; no level is left for {', '.join(none_left)}" if none_left else ""
    expected += f"; {notes['']}" if "" in notes else ""
    return BudgetError(
        "A budget cannot be met by any choice of levels",
        got=", ".join(f"{budget:.6g}" for budget in budgets),
        expected=expected,
        remedy=_remedy(budgets, entries, layers, fixed),
    )


def _entry(cost: float, name: str, kind: str, minimum: float, notes: Mapping[str, str]) -> str:
    facts = [*_share(cost, minimum), kind, *([notes[name]] if name in notes else [])]
    return f"{name} {cost:.3g} ({', '.join(facts)})"


def _share(cost: float, minimum: float) -> list[str]:
    return [f"{100 * cost / minimum:.3g} %"] if math.isfinite(minimum) else []


def _remedy(
    budgets: Sequence[float],
    entries: Sequence[tuple[float, str, str]],
    layers: Mapping[str, float],
    fixed: Mapping[str, float],
) -> str:
    """What helps depends on where the cost is: at layers with levels, or at what has none."""
    alone = math.fsum(fixed.values())
    most = [name for _, name, _ in entries if name in layers][:2]
    without = [name for _, name, _ in entries if name in fixed][:2]
    ways = ["a larger budget"]
    if alone > min(budgets):
        ways.append(f"levels alone do not help, since what has no choice costs {alone:.3g}: search {_and(without)} too")
    elif most:
        ways.append(f"stronger levels, above all for {_and(most)}")
        if without and fixed[without[0]] > layers[most[0]]:
            ways.append(f"a choice for {_and(without)}")
    return ", or ".join(ways)


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
