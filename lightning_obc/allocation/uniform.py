"""What a search is compared with: one level for the whole model."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_obc.allocation.costs import CostTable
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.search import Profile, Programme


def uniform_profile(
    database: Database, programme: Programme, costs: CostTable, scores: CostTable, budget: float
) -> Profile | None:
    """The same level for all layers: of those within the budget, the one of least total score.

    A layer that may not take the level (its shape, ``edges_at_8``, an input that no hook sees) takes the cheapest of
    those that are no stronger in zeros, weights and inputs.

    Args:
        database: The levels of all layers.
        programme: The search, which knows what a profile costs.
        costs: Costs by layer and level, of all levels that a layer may take.
        scores: Scores of the same levels; less is better.
        budget: Bound on the profile's cost, in the unit of ``costs``.

    Returns:
        The profile; None where no level keeps the budget.
    """
    levels = {name: {level.name: level for level in database.levels(name)} for name in costs}
    offered = {level: levels[name][level] for name, row in costs.items() for level in row}
    best: tuple[float, Profile] | None = None
    for level in offered.values():
        profile = {name: _closest(level, levels[name], row) for name, row in costs.items()}
        score = sum(scores[name][chosen] for name, chosen in profile.items())
        if programme.cost(profile) <= budget * (1 + 1e-9) and (best is None or score < best[0]):
            best = (score, profile)
    return None if best is None else best[1]


def _closest(level: Level, levels: Mapping[str, Level], costs: Mapping[str, float]) -> str:
    """The level itself where a layer may take it, else the cheapest that removes and rounds no more than it does."""
    if level.name in costs:
        return level.name
    fitting = [
        name
        for name in costs
        if levels[name].pattern in (None, level.pattern)
        and levels[name].weight_bits >= level.weight_bits
        and levels[name].activation_bits >= level.activation_bits
    ]
    return min(fitting, key=lambda name: costs[name])
