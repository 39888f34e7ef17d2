"""What a search chooses from: the levels of every layer with their costs, and what has no choice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from lightning_obc.allocation.costs import CostName, CostTable, LevelSize, cost_table, count_positions, level_cost
from lightning_obc.allocation.latency import LatencyTable
from lightning_obc.allocation.levels import FLOAT_BITS, Level
from lightning_obc.errors import SpecError
from lightning_obc.layers import (
    adapter_for,
    by_reason,
    first_of,
    is_lookup,
    select_layers,
    unsupported_layers,
    weight_key,
)
from lightning_obc.layers.parts import LayerPart

OUTSIDE = "layers= or exclude= leaves it out of the search"


class LevelSource(Protocol):
    """What is asked of a database here, and of what stands in for one before it is built."""

    @property
    def layers(self) -> list[str]: ...

    def levels(self, layer: str) -> list[Level]: ...

    def missing(self) -> dict[str, dict[str, str]]: ...

    def sizes(self) -> dict[str, dict[str, LevelSize]]: ...


@dataclass(frozen=True)
class Choices:
    """Costs of everything, in one unit.

    Attributes:
        table: ``{layer: {level: cost}}`` of all levels that may be chosen.
        fixed: Cost of what has no choice, by name.
        dense: Cost of the dense model.
        notes: What keeps layers from cheaper levels, or out of the search, by name; under ``""`` what has no cost.
    """

    table: CostTable
    fixed: Mapping[str, float]
    dense: float
    notes: Mapping[str, str] = field(default_factory=dict)

    def as_shares(self) -> Choices:
        """The same in shares of the dense cost, as budgets are given and as errors name them.

        Raises:
            SpecError: The dense model costs nothing.
        """
        if not self.dense > 0:
            raise SpecError("The dense model costs nothing", got=self.dense, expected="timings above 0")
        table = {name: {level: one / self.dense for level, one in row.items()} for name, row in self.table.items()}
        return Choices(table, {name: one / self.dense for name, one in self.fixed.items()}, 1.0, self.notes)


def choices(
    model: nn.Module,
    database: LevelSource,
    cost: CostName | LatencyTable,
    wanted: Sequence[Level],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask_cost: bool = False,
    edges_at_8: bool = False,
) -> Choices:
    """Costs of all levels that may be chosen, of what has no choice, and of the dense model.

    Args:
        model: The dense model.
        database: Its levels; those that are not ``wanted`` are left out.
        cost: What is counted.
        wanted: Levels to choose from, beside the dense one.
        batches: The first of them counts positions.
        forward: ``forward(model, batch)`` runs one.
        mask_cost: BOPs count one bit operation for each masked weight.
        edges_at_8: The first and the last layer take no level below 8 bits.
    """
    everything = {name: module for name, module in select_layers(model).items() if not is_lookup(module)}
    # The directory may hold more levels than this search was given.
    offered = {level.name for level in [Level(), *wanted]}
    levels = {name: [level for level in database.levels(name) if level.name in offered] for name in database.layers}
    allowed = {name: _allowed(name, everything, levels[name], edges_at_8) for name in database.layers}
    notes = _restrictions(database, everything, levels, allowed, offered)
    if isinstance(cost, LatencyTable):
        table = cost.costs(allowed)
        others = {name: row for name, row in cost.seconds.items() if name in everything and name not in table}
        fixed = {name: row.get(Level().name, 0.0) for name, row in others.items()}
        notes |= dict.fromkeys(fixed, OUTSIDE)
        fixed["everything outside of the timed layers"] = cost.overhead
        return _choices(table, fixed, notes)
    sizes = database.sizes()
    sizes = {name: {level.name: sizes[name][level.name] for level in chosen} for name, chosen in allowed.items()}
    positions = count_positions(model, everything, next(iter(batches)), forward=forward, skip_unreached=True)
    table = cost_table(cost, sizes, positions, mask_cost=mask_cost)
    if cost == "bytes":
        searched = sum(row[Level().name].weights for row in sizes.values())
        fixed, reasons = _other_bytes(model, set(sizes), searched)
        return _choices(table, fixed, notes | reasons)
    dense = {name: LevelSize.dense(_numel(everything[name])) for name in positions if name not in table}
    fixed = {name: level_cost(cost, size, positions[name]) for name, size in dense.items()}
    notes |= dict.fromkeys(fixed, OUTSIDE)
    if uncounted := by_reason(unsupported_layers(model), "not counted at all", "not counted at all"):
        notes[""] = "; ".join(uncounted)
    return _choices(table, fixed, notes)


def _choices(table: CostTable, fixed: Mapping[str, float], notes: Mapping[str, str]) -> Choices:
    return Choices(table, fixed, sum(fixed.values()) + sum(row[Level().name] for row in table.values()), notes)


def _numel(module: nn.Module) -> int:
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter.current(module).numel()


def _edges(everything: Mapping[str, nn.Module]) -> tuple[str, str]:
    return next(iter(everything)), next(reversed(list(everything)))


def _allowed(name: str, everything: Mapping[str, nn.Module], levels: Sequence[Level], edges_at_8: bool) -> list[Level]:
    """Levels of a layer, without those that its place or its kind rules out."""
    low = 8 if edges_at_8 and name in _edges(everything) else 0
    inside = isinstance(everything[name], LayerPart)
    return [
        level
        for level in levels
        if min(level.weight_bits, level.activation_bits) >= low and not (inside and level.activations)
    ]


def _restrictions(
    database: LevelSource,
    everything: Mapping[str, nn.Module],
    levels: Mapping[str, Sequence[Level]],
    allowed: Mapping[str, Sequence[Level]],
    offered: Collection[str],
) -> dict[str, str]:
    """Why layers have fewer levels than were asked for."""
    notes = {}
    for name, missing in database.missing().items():
        if unfit := [level for level in missing if level in offered]:
            notes[name] = f"levels that do not fit it: {first_of(unfit)}"
    for name in levels:
        if len(allowed[name]) == len(levels[name]):
            continue
        inside = isinstance(everything[name], LayerPart)
        reason = "inputs of a part stay in floating point: give it bits of weights alone, such as (4, None)"
        reason = reason if inside else "edges_at_8 keeps it at 8 bits or more"
        notes[name] = f"{notes[name]}, {reason}" if name in notes else reason
    return notes


def _other_bytes(model: nn.Module, searched: set[str], weights: int) -> tuple[dict[str, float], dict[str, str]]:
    """Bytes of all parameters that are not searched: of layers by name, of the rest together; and the reasons."""
    reasons = dict.fromkeys((name for name in select_layers(model) if name not in searched), OUTSIDE)
    reasons |= {name: f"not supported: {reason}" for name, reason in unsupported_layers(model).items()}
    layers, own = select_layers(model), dict.fromkeys(reasons, 0)
    counted = {weight_key(layers[name]) for name in searched}
    for name, parameter in model.named_parameters():
        if id(parameter) in counted:
            continue
        owner, _, key = name.rpartition(".")
        layer = next((one for one in (owner, name) if one in own), None)
        if layer is not None and key != "bias":
            own[layer] += parameter.numel()
    rest = sum(parameter.numel() for parameter in model.parameters()) - weights - sum(own.values())
    fixed = {name or "the model's own parameters": 0.125 * FLOAT_BITS * count for name, count in own.items() if count}
    fixed["biases, norms and other parameters"] = max(0, rest) * FLOAT_BITS / 8
    return fixed, {name: reason for name, reason in reasons.items() if name in fixed}
